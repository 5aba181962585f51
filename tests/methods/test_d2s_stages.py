"""D2S-VSE of ours: plain loops with their gradients, what the two stages promise, flags."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from lib.batch import length_mask
from lib.errors import InputError
from lib.methods.d2s_family import distillation
from lib.methods.registry import check_arguments, get_method
from lib.model.decoder import PromptDecoder
from lib.model.losses import AlignmentLoss
from tests.helpers import encode, pair_inputs, tiny_args, tiny_model
from tests.methods.test_d2s import RecordedImages, RecordedWords, captions, close, unit

# --- ours against plain loops ------------------------------------------------------------------


def naive_head(head, words: torch.Tensor, statistics: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and embedding of one caption (n, width); statistics are BatchNorm's."""
    mean, variance = statistics
    linear, first, norm, last = head.features.linear, *(head.features.mlp[i] for i in (0, 1, 3))
    inner = (first(words) - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    features = linear(words) + last(inner.relu())
    weights = head.pool.weights(torch.tensor([len(words)]), len(words))[0]
    pooled = (features.sort(0, descending=True).values * weights[:, None]).sum(0)
    return features, layer_norm(pooled, pooled.shape, head.norm.weight, head.norm.bias)


def naive_prompt(decoder, features: torch.Tensor) -> torch.Tensor:
    states = torch.cat([features, decoder.tokens])
    for block in decoder.blocks:
        attention, channels = block.self_attn, states.shape[1]
        normed = block.norm1(states)
        q, k, v = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
        heads = []
        for head in range(4):
            part = slice(head * channels // 4, (head + 1) * channels // 4)
            scores = q[:, part] @ k[:, part].T / (channels // 4) ** 0.5
            heads.append(scores.softmax(1) @ v[:, part])
        states = states + attention.out_proj(torch.cat(heads, dim=1))
        states = states + block.linear2(gelu(block.linear1(block.norm2(states))))
    return decoder.norm(states)[-len(decoder.tokens) :].mean(0)


def naive_loss(model, pixels, words, lengths, dense, dense_lengths, image_ids) -> torch.Tensor:
    """Hinge (sum) plus 1 − cosine to the teacher, image by image and caption by caption."""
    real = torch.cat([row[:n] for row, n in zip(words, lengths, strict=True)])
    inner = model.text_head.features.mlp[0](real)
    statistics = inner.mean(0), inner.var(0, correction=0)
    norm = model.teacher.head.features.mlp[1]
    seen, said, taught = [], [], []
    for image in pixels:
        features = model.image_head(image)
        weights = model.image_pool.weights(torch.tensor([len(image)]), len(image))[0]
        seen.append(unit((features.sort(0, descending=True).values * weights[:, None]).sum(0)))
    for row, n in zip(words, lengths, strict=True):
        features, pooled = naive_head(model.text_head, row[:n], statistics)
        said.append(pooled + naive_prompt(model.prompt, features))
    for row, n in zip(dense, dense_lengths, strict=True):
        moments = norm.running_mean, norm.running_var
        taught.append(naive_head(model.teacher.head, row[:n], moments)[1].detach())
    loss, count = 0.0, len(said)
    for i in range(count):
        for j in range(count):
            if image_ids[i] == image_ids[j]:
                continue
            pair = seen[i] @ unit(said[j])
            loss = loss + (0.2 + pair - seen[i] @ unit(said[i])).clamp(min=0)
            loss = loss + (0.2 + pair - seen[j] @ unit(said[j])).clamp(min=0)
    cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in zip(said, taught, strict=True)]
    return loss + 1 - sum(cosines) / count


def test_loss_and_gradients_are_those_of_a_plain_form():
    torch.manual_seed(0)
    model = get_method("d2s")(
        RecordedImages(),
        RecordedWords(),
        AlignmentLoss(),
        embed_size=16,
        prompt=partial(PromptDecoder, 16, 3, 2),
        size_augment=False,
        dropout=0.0,
    )
    model = model.double().train()
    pixels = torch.randn(4, 6, 24, dtype=torch.float64, requires_grad=True)
    words = torch.randn(4, 5, 20, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(4, 8, 20, dtype=torch.float64)
    lengths, dense_lengths = torch.tensor([5, 2, 3, 4]), torch.tensor([4, 8, 6, 3])
    image_ids = torch.tensor([0, 1, 2, 0])
    images = model.encode_images(pixels)
    texts = captions(model, words, lengths, dense, dense_lengths)
    found = model.losses(images, texts, image_ids)["loss"]
    expected = naive_loss(model, pixels, words, lengths, dense, dense_lengths, image_ids)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    leaves = [pixels, words, *(p for p in model.parameters() if p.requires_grad)]
    pairs = zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-8)


def test_distillation_by_hand():
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert float(distillation(student, teacher, "cos")) == pytest.approx(0.5)
    assert float(distillation(student, teacher, "l2")) == pytest.approx((1 + 4 + 4 + 4) / 4)


# --- stages ------------------------------------------------------------------------------------


def test_a_caption_of_ours_is_its_own_in_any_batch():
    inputs = pair_inputs(method="d2s")
    model = tiny_model("d2s").eval()
    texts = encode(model, inputs)[1]
    for row in range(6):
        length = int(inputs["lengths"][row])
        alone = model.encode_texts(inputs["ids"][row : row + 1, :length], torch.tensor([length]))
        close(alone.local[0], texts.local[row])


def test_ours_is_the_same_in_training_and_evaluation_without_chance():
    inputs = pair_inputs(method="d2s")
    model = tiny_model("d2s").train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.eval()  # running statistics in both
    images, texts = encode(model, inputs)
    model.eval()
    other_images, other_texts = encode(model, inputs)
    close(images.local, other_images.local)
    close(texts.local, other_texts.local)


def test_the_teacher_learns_nothing():
    model = tiny_model("d2s").train()
    model.training_losses(**pair_inputs(method="d2s"))["loss"].backward()
    assert model.teacher.encoder is not model.text_encoder
    assert all(not p.requires_grad and p.grad is None for p in model.teacher.parameters())


def test_stage_2_starts_with_stage_1_and_its_copy_as_teacher():
    first = tiny_model("d2s", seed=1, distill=False, pretrain=True, weight_path=None)
    second = tiny_model("d2s", seed=2)
    second.start_from(first)
    inputs = pair_inputs(method="d2s")
    first.eval(), second.eval()
    second.prompt = None
    for one, other in zip(encode(first, inputs), encode(second, inputs), strict=True):
        assert torch.equal(one.local, other.local)
    taught = second._taught(inputs["dense_ids"], inputs["dense_lengths"])
    expected = first.encode_texts(inputs["dense_ids"], inputs["dense_lengths"]).local[:, 0]
    assert torch.equal(taught, expected)


def test_another_method_is_no_stage_1():
    with pytest.raises(InputError, match="--weight_path holds a vse model"):
        tiny_model("d2s").start_from(tiny_model("vse"))


def test_without_a_stage_captions_alone_are_trained_on():
    args = tiny_args("d2s", distill=False, weight_path=None)
    assert not get_method("d2s").trains_on_dense(args)
    model = tiny_model("d2s", distill=False, weight_path=None)
    assert model.prompt is None
    losses = model.training_losses(**pair_inputs(method="d2s", distill=False))
    assert "distillation" not in losses


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"pretrain": True}, "two stages"),
        ({"weight_path": None}, "--distill goes on from stage 1: add --weight_path"),
        ({"embed_size": 30}, "--embed_size 30: the prompt's 4 attention heads"),
        ({"embed_size": 36, "use_decoder": False}, "8 attention heads"),
        ({"use_decoder": False, "gpo": True}, "add --use_decoder"),
        ({"num_tokens": 0}, "--num_tokens 0"),
        ({"decoder_depth": 0}, "--decoder_depth 0"),
    ],
)
def test_flags_that_can_not_be_are_refused(flags, told):
    with pytest.raises(InputError, match=told):
        check_arguments(tiny_args("d2s", **flags))


@pytest.mark.parametrize("flags", [{"gpo": True}, {"use_decoder": False}, {"no_res_embed": True}])
@pytest.mark.parametrize("method", ["d2s", "d2s_released"])
def test_every_parameter_learns_with_each_flag(method, flags):
    model = tiny_model(method, **flags).train()
    torch.manual_seed(0)
    model.training_losses(**pair_inputs(method=method))["loss"].backward()
    dead = {"text_head.norm.", "text_head.pool."} if "no_res_embed" in flags else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(tuple(dead)):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.abs().sum() > 0), name


def test_what_the_encoders_say_of_padding_is_read_as_in_the_released_code():
    """On the CPU captions of all lengths go in parts, which would leave zeros behind each."""
    model = tiny_model("d2s_released", distill=True).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (40,), generator=generator)
    ids, _ = model.padded(torch.randint(5, 30, (40, 12), generator=generator), lengths)
    mask = length_mask(lengths, ids.shape[1]).long()
    for encoder in (model.text_encoder, model.teacher.encoder):
        whole = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(encoder(ids, lengths).local, whole)
