"""VSE++, SCAN, CHAN and the dense match against loops over single pairs, in float64."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from torch.nn.functional import leaky_relu, softplus

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.registry import add_model_arguments, check_arguments, get_method
from lib.model.alignment import DenseMatch
from tests.helpers import encode, pair_inputs, random_tokens, tiny_args, tiny_model


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def pairs_of(images, texts, pair):
    """The matrix of `pair(image's real tokens, caption's real tokens)`, one pair at a time."""
    return torch.stack(
        [
            torch.stack(
                [
                    pair(image[real], caption[words])
                    for caption, words in zip(texts.local, texts.mask, strict=True)
                ]
            )
            for image, real in zip(images.local, images.mask, strict=True)
        ]
    )


def assert_same(found, expected, *inputs):
    """Both agree, and so do the gradients of a function that weighs every entry differently."""
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-9)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        assert other.abs().sum() > 0
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-10)


def inputs(ragged_images=False):
    images = random_tokens(5, 6, 8, seed=1, ragged=ragged_images, cls=True)
    return images, random_tokens(7, 5, 8, seed=2, ragged=True)


# --- SCAN and CHAN -----------------------------------------------------------------------------


def attends(queries, context, smooth):
    """SCAN of SPEC 10 for one pair, query by query."""
    attention = leaky_relu(torch.stack([unit(queries) @ unit(c) for c in context]), 0.1)  # (N, Q)
    attention = attention / attention.norm(dim=1, keepdim=True)
    cosines = []
    for q, query in enumerate(queries):
        weights = (smooth * attention[:, q]).exp()
        attended = (weights / weights.sum()) @ unit(context)
        cosines.append(unit(query) @ unit(attended))
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("ragged_images", [False, True])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_scan_is_attention_query_by_query(direction, ragged_images):
    images, texts = inputs(ragged_images)
    model = tiny_model("scan", scan_direction=direction, shard_size=3)

    def pair(patches, words):
        t2i, i2t = attends(words, patches, 9.0), attends(patches, words, 4.0)
        return {"t2i": t2i, "i2t": i2t, "both": (t2i + i2t) / 2}[direction]

    expected = pairs_of(images, texts, pair)
    assert_same(model.similarity(images, texts), expected, images.local, texts.local)


def test_scan_reads_its_sharpness_from_the_flags():
    images, texts = inputs()
    model = tiny_model("scan", scan_lambda_t2i=2.0)
    expected = pairs_of(images, texts, lambda patches, words: attends(words, patches, 2.0))
    assert torch.allclose(model.similarity(images, texts), expected)
    with pytest.raises(InputError, match="--scan_lambda_i2t"):
        check_arguments(tiny_args("scan", scan_lambda_i2t=-1.0))


@pytest.mark.parametrize("ragged_images", [False, True])
def test_chan_is_the_best_patch_of_each_word(ragged_images):
    images, texts = inputs(ragged_images)
    model = tiny_model("chan", shard_size=3)

    def pair(patches, words):
        return sum(max(unit(word) @ unit(p) for p in patches) for word in words) / len(words)

    expected = pairs_of(images, texts, pair)
    assert_same(model.similarity(images, texts), expected, images.local, texts.local)


@pytest.mark.parametrize("method", ["scan", "chan"])
def test_padding_with_zeros_or_rubbish_changes_nothing(method):
    images, texts = inputs()
    model = tiny_model(method, **({"scan_direction": "both"} if method == "scan" else {}))
    before = model.similarity(images, texts)
    rubbish = Tokens(texts.local.masked_fill(~texts.mask[..., None], 50.0), texts.mask)
    assert torch.allclose(model.similarity(images, rubbish), before)
    after = model.similarity(images, texts.padded(9))
    assert torch.allclose(after, before)
    assert torch.autograd.grad(after.sum(), texts.local)[0].isfinite().all()


# --- VSE++ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["gpo", "mean"])
def test_vse_is_the_cosine_of_pooled_tokens(pool):
    model = tiny_model("vse", vse_pool=pool, shard_size=4).double().eval()
    batch = pair_inputs(method="vse")
    batch["pixels"] = model.image_encoder.normalise(batch["pixels"])
    images, texts = encode(model, batch)
    assert images.local.shape == texts.local.shape == (6, 1, 32)
    assert images.mask.all()
    patches = model.image_encoder(batch["pixels"])
    words = model.text_encoder(batch["ids"], batch["lengths"])

    def embedding(rows, pooling):
        rows = rows[None]
        mask = torch.ones(rows.shape[:2], dtype=torch.bool)
        return unit((pooling(rows, mask) if pool == "gpo" else rows.mean(1))[0])

    def pair(image, caption):
        return embedding(image, model.image_pool) @ embedding(caption, model.text_pool)

    expected = pairs_of(patches, words, pair)
    parameters = [one for one in model.parameters() if one.requires_grad]
    assert_same(model.similarity(images, texts), expected, *parameters)


# --- dense text --------------------------------------------------------------------------------


def dense_match(kind):
    def max_mean(dense, words):
        cosines = unit(dense) @ unit(words).T
        for_words = sum(max(column) for column in cosines.T) / len(words)
        return for_words + sum(max(row) for row in cosines) / len(dense)

    def mean(dense, words):
        return unit(dense.mean(0)) @ unit(words.mean(0))

    return {"max_mean": max_mean, "mean": mean}[kind]


@pytest.mark.parametrize("kind", ["max_mean", "mean"])
def test_dense_text_matches_word_with_word(kind):
    dense = random_tokens(5, 6, 8, seed=3, ragged=True)
    texts = random_tokens(7, 5, 8, seed=2, ragged=True)
    model = tiny_model("dense_text", dense_match=kind, shard_size=3)
    expected = pairs_of(dense, texts, dense_match(kind))
    assert_same(model.similarity(dense, texts), expected, dense.local, texts.local)
    padded = model.similarity(dense.padded(10), texts.padded(9))
    assert torch.allclose(padded, expected)


def test_dense_text_reads_no_pixel():
    model = tiny_model("dense_text")
    assert model.image_encoder is None
    assert not model.uses_pixels
    assert model.protocol == "image"
    assert model.match.kind == "max_mean"  # what --dense_match none stands for here
    batch = pair_inputs(method="dense_text")
    losses = model.training_losses(**{**batch, "pixels": None})
    losses["loss"].backward()
    assert all(one.grad.abs().sum() > 0 for one in model.parameters())


@pytest.mark.parametrize("kind", ["max_mean", "mean"])
@pytest.mark.parametrize("side", ["image", "none"])
def test_seps_adds_the_weighted_dense_match(kind, side):
    flags = {"dense_match": kind, "dense_side": side}
    model = tiny_model("seps", **flags).eval()
    assert model.protocol == "image"
    images, texts = encode(model, pair_inputs(method="seps", **flags))
    with_match = model.similarity(images, texts)
    term = pairs_of(images.dense, texts, dense_match(kind))
    match, model.dense_match = model.dense_match, None
    assert torch.allclose(with_match, model.similarity(images, texts) + 0.1 * term, atol=1e-5)
    with torch.no_grad():
        match.raw_weight.fill_(math.log(math.expm1(0.7)))
    model.dense_match = match
    weighted = model.similarity(images, texts)
    assert torch.allclose(weighted - with_match, 0.6 * term, atol=1e-5)
    weighted.diagonal().sum().backward()
    assert match.raw_weight.grad.abs() > 0


def test_a_gate_lets_each_image_weigh_its_own_dense_text():
    flags = {"dense_match": "max_mean", "match_gate": "image"}
    model = tiny_model("seps", **flags).eval()
    images, texts = encode(model, pair_inputs(method="seps", **flags))
    started = model.similarity(images, texts)
    term = pairs_of(images.dense, texts, dense_match("max_mean"))
    gate = model.dense_match.gate.weight
    with torch.no_grad():  # at first all weigh the same
        match, model.dense_match = model.dense_match, None
        plain = model.similarity(images, texts)
        assert torch.allclose(started, plain + 0.1 * term, atol=1e-5)
        model.dense_match = match
        gate.normal_(std=30.0)
    pixels = images.local.mean(1) / images.local.mean(1).norm(dim=-1, keepdim=True)
    words = [
        one[real].mean(0) for one, real in zip(images.dense.local, images.dense.mask, strict=True)
    ]
    words = torch.stack([one / one.norm() for one in words])
    raw = match.raw_weight + (pixels * words) @ gate[0]
    weighted = model.similarity(images, texts)
    weights = torch.log1p(raw.exp())
    assert weights.std() > 0.01
    assert torch.allclose(weighted, plain + weights[:, None] * term, atol=1e-4)
    weighted.diagonal().sum().backward()
    assert gate.grad.abs().sum() > 0


@pytest.mark.parametrize("flags", [{"match_weight": 1.0}, {"match_gate": "image"}])
def test_flags_of_a_match_that_is_not_asked_for_are_refused(flags):
    with pytest.raises(InputError, match="give --dense_match max_mean"):
        get_method("seps").check_arguments(tiny_args("seps", **flags))


def test_dense_match_is_off_unless_asked_for():
    assert tiny_model("seps").dense_match is None
    assert not any("raw_weight" in name for name in tiny_model("seps").state_dict())


def test_a_mixed_protocol_is_refused():
    args = tiny_args("seps", dense_match="mean", dense_side="caption")
    with pytest.raises(InputError, match="--dense_side image"):
        get_method("seps").check_arguments(args)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="known: max_mean, mean, sentence"):
        DenseMatch("median")
    with pytest.raises(ValueError, match="known: gpo, mean"):
        tiny_model("vse", vse_pool="median")


@pytest.mark.parametrize("weight", [1e-30, 0.1, 30.0, 1e6])
def test_the_match_starts_at_its_weight(weight):
    raw = DenseMatch("mean", weight).raw_weight
    assert float(softplus(raw)) == pytest.approx(weight, rel=1e-5)


def test_the_flags_parse():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    line = "--vse_pool mean --scan_direction both --dense_match mean --avse_block 64"
    args = parser.parse_args(line.split())
    assert (args.vse_pool, args.scan_direction, args.dense_match) == ("mean", "both", "mean")


def test_max_mean_of_dense_match_has_no_leaky_slope():
    """A negative cosine counts in full."""
    dense = Tokens(torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool))
    words = Tokens(torch.tensor([[[-1.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool))
    match = DenseMatch("max_mean")
    assert float(match(match.prepare(dense), match.prepare(words)).detach()) == -2.0
