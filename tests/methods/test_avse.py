"""AVSE: the official recording, loops, and what its views promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinModel

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.avse import (
    block_similarity,
    cross_correlation_loss,
    radial_order,
    run_blocks,
    unit_blocks,
    view_tokens,
)
from lib.methods.registry import check_arguments, get_method
from lib.model.encoders import ImageEncoder
from lib.model.pooling import TokenHead, drop_tokens
from tests.helpers import encode, pair_inputs, tiny_args, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "avse_modules.npz"


def recorded(name):
    with np.load(GOLDEN) as arrays:
        return torch.tensor(arrays[name])


def one_token(embeddings):
    return Tokens(embeddings[:, None], torch.ones(len(embeddings), 1, dtype=torch.bool))


def official_model():
    """A model whose encoders go unused: the recording starts from embeddings."""
    return tiny_model("avse", embed_size=512, shard_size=4)


# --- the official recording --------------------------------------------------------------------


def test_similarity_is_the_official_one():
    images, texts = one_token(recorded("image_views")), one_token(recorded("caption"))
    similarity = official_model().similarity(images, texts)
    assert torch.allclose(similarity, recorded("similarity"), atol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "hard"])
def test_loss_and_gradients_are_the_official_ones(kind):
    images = recorded("loss_image").requires_grad_()
    captions = recorded("loss_caption").requires_grad_()
    model = official_model()
    model.set_hard_negatives(kind == "hard")
    losses = model.losses(one_token(images), one_token(captions), torch.arange(len(images)))
    losses["loss"].backward()
    # float32 sums of half a thousand: 1e-5 of the value
    assert float(losses["loss"].detach()) == pytest.approx(
        float(recorded(f"loss_{kind}")), rel=1e-6
    )
    for found, name in ((images.grad, "image"), (captions.grad, "caption")):
        expected = recorded(f"grad_{name}_{kind}")
        assert (found - expected).norm() <= 1e-4 * expected.norm()


# --- formulas against loops --------------------------------------------------------------------


def test_block_similarity_is_a_loop_over_blocks():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    texts = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    found = block_similarity(unit_blocks(images, 3), unit_blocks(texts, 3))
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            expected = sum(
                max(torch.cosine_similarity(part, other, dim=0) for other in image.split(3))
                for part in text.split(3)
            )
            assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-12)


def test_cross_correlation_is_a_loop_over_channels():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = torch.cosine_similarity(first[:, i], second[:, j], dim=0) / 5
            expected += float((c - 1) ** 2 if i == j else 0.0051 * c**2)
    assert float(cross_correlation_loss(first, second)) == pytest.approx(expected, abs=1e-12)
    inputs = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(cross_correlation_loss, inputs)


def test_radial_order_starts_at_the_centre_and_never_comes_nearer():
    centres = torch.tensor([0, 9, 35])
    order = radial_order(centres, (6, 6))
    for centre, row in zip(centres.tolist(), order.tolist(), strict=True):
        assert row[0] == centre
        assert sorted(row) == list(range(36))
        away = [np.hypot(patch // 6 - centre // 6, patch % 6 - centre % 6) for patch in row]
        assert away == sorted(away)


def test_drop_tokens_keeps_a_token_and_adds_none():
    torch.manual_seed(0)
    mask = torch.rand(3000, 20) < 0.7
    mask[:, 0] = True
    kept = drop_tokens(mask)
    assert not (kept & ~mask).any()
    assert kept.any(1).all()
    assert drop_tokens(torch.ones(500, 1, dtype=torch.bool)).all()
    # a row loses 0.2·u of its tokens, u uniform in (0.2, 1), with probability 0.8
    lost = ~drop_tokens(torch.ones(2000, 500, dtype=torch.bool))
    assert float((~lost.any(1)).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(lost.float().mean()) == pytest.approx(0.8 * 0.2 * 0.6, abs=0.005)


def test_token_head_leaves_padding_out_of_the_statistics():
    torch.manual_seed(0)
    head, words = TokenHead(6, 8), torch.randn(3, 5, 6)
    mask = torch.arange(5) < torch.tensor([[5], [3], [2]])
    found = head(words.masked_fill(~mask[..., None], 1e3), mask)
    real = words[mask]
    expected = head.linear(real) + head.mlp(real)
    assert torch.allclose(found[mask], expected, atol=1e-6)
    assert (found[~mask] == 0).all()


# --- views -------------------------------------------------------------------------------------


def test_all_tokens_through_the_blocks_are_the_vit_without_its_last_norm():
    model = tiny_model("avse", tiny_layers=2)
    pixels = torch.rand(2, 3, 32, 32)
    encoder = model.image_encoder
    centres = torch.tensor([[0.0, 0.0]])  # row-major order is not distance order: compare sorted
    views = view_tokens(encoder, pixels, centres, share=1.0)
    whole = encoder.backbone(pixels).last_hidden_state  # its LayerNorm is out already
    assert isinstance(encoder.backbone.layernorm, nn.Identity)
    order = radial_order(torch.tensor([0]), (4, 4))[0]
    assert torch.allclose(views[:, 0], whole[:, 0], atol=1e-5)
    assert torch.allclose(views[:, 1:], whole[:, 1:][:, order], atol=1e-5)


def test_views_keep_the_patches_nearest_to_their_centres():
    model = tiny_model("avse")
    encoder = model.image_encoder
    pixels = torch.rand(2, 3, 32, 32)
    centres = torch.tensor([[0.0, 0.5], [0.99, 0.3]])  # patches 0 and 8, 15 and 4
    views = view_tokens(encoder, pixels, centres, share=0.8)
    assert views.shape == (4, 1 + 13, 32)  # int(17·0.8) patches of 16
    embedded = encoder.backbone.embeddings(pixels)
    for row, (image, centre) in enumerate([(0, 0), (1, 8), (0, 15), (1, 4)]):
        order = radial_order(torch.tensor([centre]), (4, 4))[0, :13]
        tokens = torch.cat([embedded[image, :1], embedded[image, 1:][order]])
        assert torch.allclose(views[row], run_blocks(encoder.backbone, tokens[None])[0], atol=1e-5)


def test_views_of_swin_are_taken_from_its_output():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    encoder = ImageEncoder(SwinModel(config, add_pooling_layer=False).eval(), 16, 32)
    pixels = torch.rand(2, 3, 32, 32)
    views = view_tokens(encoder, pixels, torch.tensor([[0.0, 0.0]]), share=0.9)
    order = radial_order(torch.tensor([0]), (4, 4))[0, :14]  # int(16·0.9)
    assert torch.equal(views, encoder.hidden(pixels)[:, order])


def test_evaluation_views_follow_the_seed_and_no_batch_mate():
    batch = pair_inputs(method="avse")
    model = tiny_model("avse").eval()
    images, _ = encode(model, batch)
    assert images.local.shape == (6, 1, 64)
    torch.manual_seed(99)
    assert torch.equal(model.encode_images(batch["pixels"]).local, images.local)
    alone = model.encode_images(batch["pixels"][3:4])
    assert torch.allclose(alone.local, images.local[3:4], atol=1e-6)
    other = tiny_model("avse")
    other.seed = 3
    other.eval()
    assert not torch.allclose(other.encode_images(batch["pixels"]).local, images.local, atol=1e-4)
    first, second = images.local.chunk(2, dim=2)
    assert not torch.allclose(first, second, atol=1e-4)


def test_training_views_are_drawn_anew():
    model = tiny_model("avse", avse_keep_train=0.8)
    pixels = pair_inputs(method="avse")["pixels"]
    assert not torch.allclose(
        model.encode_images(pixels).local, model.encode_images(pixels).local, atol=1e-4
    )


def test_training_without_chance_is_evaluation_but_for_batch_norm():
    flags = {"avse_keep_train": 0.9, "size_augment": 0, "avse_dropout": 0.0}
    model = tiny_model("avse", **flags)
    pixels = pair_inputs(method="avse")["pixels"]
    model._view_centres = lambda images, device: torch.full((2, images), 0.4)
    training = model.encode_images(pixels).local
    assert torch.allclose(training, model.eval().encode_images(pixels).local, atol=1e-6)
    model.train().keep_train = 0.5
    assert not torch.allclose(training, model.encode_images(pixels).local, atol=1e-4)


# --- flags -------------------------------------------------------------------------------------


def test_blocks_shrink_to_a_small_joint_space_and_must_divide_a_large_one():
    assert tiny_model("avse").block == 32
    assert tiny_model("avse", avse_block=16).block == 16
    check = get_method("avse").check_arguments
    check(tiny_args("avse", embed_size=768))
    with pytest.raises(InputError, match="--embed_size 700"):
        check(tiny_args("avse", embed_size=700))
    with pytest.raises(InputError, match="--avse_block 0"):
        check(tiny_args("avse", avse_block=0))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("avse_keep_train", 0.0), ("avse_keep_eval", 1.5), ("avse_dropout", 1.0)],
)
def test_shares_out_of_range_are_refused(flag, value):
    with pytest.raises(InputError, match=f"--{flag}"):
        check_arguments(tiny_args("avse", **{flag: value}))
