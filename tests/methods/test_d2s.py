"""D2S-VSE: the official recording, plain loops, what the two stages promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.batch import Tokens, length_mask
from lib.checkpoints.official_d2s import translated
from lib.methods import d2s_family
from lib.methods.registry import get_method
from lib.model.decoder import PromptAttention, PromptDecoder
from lib.model.losses import AlignmentLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "d2s_modules.npz"
PROMPTS = {
    "": partial(PromptDecoder, 32, 6, 4),
    "gpo": partial(PromptDecoder, 32, 6, 4, gpo=True),
    "cross": partial(PromptAttention, 32, 6),
    "nores": partial(PromptDecoder, 32, 6, 4),
}


@pytest.fixture(scope="module")
def official():
    with np.load(GOLDEN) as arrays:
        return {name: torch.tensor(arrays[name]) for name in arrays}


class RecordedImages(nn.Module):
    """Hands out its pixels as the last hidden states, the first as [CLS]."""

    width = 24

    def forward(self, hidden: torch.Tensor) -> Tokens:
        mask = hidden.new_ones(len(hidden), hidden.shape[1] - 1, dtype=torch.bool)
        return Tokens(hidden[:, 1:], mask, hidden[:, :1])


class RecordedWords(nn.Module):
    """Hands out recorded last hidden states, whatever the ids."""

    width = 20
    hidden: torch.Tensor

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> Tokens:
        return Tokens(self.hidden, length_mask(lengths, self.hidden.shape[1]))


def official_weights(official: dict, case: str = "") -> dict:
    """The recorded stage-2 weights under our names; the official loader's own translation."""
    state = {k.removeprefix("weights."): v for k, v in official.items() if k[:8] == "weights."}
    extra = f"weights_{case}."
    more = {k.removeprefix(extra): v for k, v in official.items() if k.startswith(extra)}
    if case == "cross":
        state = {k: v for k, v in state.items() if ".decoder_" not in k and "mask_token" not in k}
    return translated({**state, **more})


def official_model(official: dict, method: str = "d2s_released", case: str = "", stage: int = 2):
    model = get_method(method)(
        RecordedImages(),
        RecordedWords(),
        AlignmentLoss(),
        embed_size=32,
        prompt=PROMPTS[case] if stage == 2 else None,
        residual=case != "nores",
        dropout=0.0,
    )
    state = official_weights(official, case)
    if stage == 1:
        state = {k: v for k, v in state.items() if not k.startswith(("teacher.", "prompt."))}
    model.load_state_dict(state)
    return model.eval()


def ids_of(words: torch.Tensor) -> torch.Tensor:
    return torch.ones(words.shape[:2], dtype=torch.long)


def captions(model, words: torch.Tensor, lengths: torch.Tensor, *dense: torch.Tensor) -> Tokens:
    """The captions' tokens; `dense` is the dense texts' words and lengths."""
    model.text_encoder.hidden = words
    if not dense:
        return model.encode_texts(ids_of(words), lengths)
    if model.teacher is not None:
        model.teacher.encoder.hidden = dense[0]
    return model.encode_texts(ids_of(words), lengths, ids_of(dense[0]), dense[1])


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / (values.norm(dim=-1, keepdim=True) + 1e-8)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 1e-4 * expected.norm())


# --- the official recording, evaluation --------------------------------------------------------


@pytest.mark.parametrize("case", ["", "gpo", "cross", "nores"])
def test_evaluation_is_the_official_one(official, case):
    model = official_model(official, case=case)
    prefix = f"{case}_" if case else ""
    with torch.no_grad():
        images = model.encode_images(official["images"])
        texts = captions(model, official["words"], official["caption_lengths"])
        close(images.local[:, 0], official["image_embedding"])
        close(model.prepare_texts(texts).embedding, official[f"{prefix}caption_embedding"])
        close(model.similarity(images, texts), official[f"{prefix}similarity"])


def test_stage_1_is_the_official_one(official):
    model = official_model(official, stage=1)
    with torch.no_grad():
        images = model.encode_images(official["images"])
        texts = captions(model, official["words"], official["caption_lengths"])
        close(texts.local[:, 0], official["pretrain_caption_embedding"])
        close(model.similarity(images, texts), official["pretrain_similarity"])


def test_features_and_prompt_are_the_official_ones(official):
    model = official_model(official)
    words = Tokens(official["words"], length_mask(official["caption_lengths"], 9))
    with torch.no_grad():
        features, pooled = model.text_head(words, model.seen(words.mask))
        close(features, official["word_features"])
        close(pooled, official["caption_pooled"])
        close(model.prompt(features, model.seen(words.mask)), official["caption_prompt"])


def test_ours_is_the_official_one_where_no_padding_is_there(official):
    """Each caption by itself: what a decoder that masks padding must give in any batch."""
    words, lengths = official["words"], official["caption_lengths"]
    released, ours = official_model(official), official_model(official, "d2s")
    with torch.no_grad():
        alone = torch.cat(
            [
                released.prepare_texts(captions(released, one[None, :n], n[None])).embedding
                for one, n in zip(words, lengths, strict=True)
            ]
        )
        close(alone, official["caption_embedding_alone"])
        # ours adds the prompt whole; with length 1 it is the recorded one
        ours.scaled = unit
        close(ours.prepare_texts(captions(ours, words, lengths)).embedding, alone)
        together = official_model(official)
        batch = together.prepare_texts(captions(together, words, lengths)).embedding
        assert float((batch - alone).abs().max()) > 1e-2


def test_the_prompt_is_added_whole_in_training_alone_as_released(official):
    model = official_model(official)
    with torch.no_grad():
        images = model.encode_images(official["train_images"])
        train = official["train_words"], official["train_lengths"]
        close(model.similarity(images, captions(model, *train)), official["pair_similarity"])
        model.scaled = lambda prompt: prompt
        texts = captions(model, *train)
        close(model.similarity(images, texts), official["pair_similarity_training_sum"])
        model.set_hard_negatives(True)
        texts.dense = taught(model, official)
        loss = model.losses(images, texts, official["image_ids"])["loss"]
        close(loss, official["pair_loss_hard_eval_mode"])


def taught(model, official: dict) -> Tokens:
    """The teacher's embeddings of the recorded dense texts, in the mode it is in."""
    model.teacher.encoder.hidden = official["dense_words"]
    embeddings = model._taught(ids_of(official["dense_words"]), official["dense_lengths"])
    return Tokens(embeddings[:, None], torch.ones(len(embeddings), 1, dtype=torch.bool))


# --- the official recording, training ----------------------------------------------------------


@pytest.fixture
def recorded_drops(official, monkeypatch):
    monkeypatch.setattr(d2s_family, "drop_tokens", lambda mask: official["kept_tokens"] & mask)


def trained(model, official: dict, kind: str, stage: int = 2, scale: float = 1.0, loss="cos"):
    """The losses of the recorded training step and its leaves."""
    model.train()
    model.set_hard_negatives(kind == "hard")
    model.set_alignment_scale(scale)
    model.distill_loss = loss
    pixels = official["train_images"].clone().requires_grad_()
    dense = official["dense_words"], official["dense_lengths"]
    name, lengths = "train_words", official["train_lengths"]
    if stage == 1:
        name, lengths = "dense_words", official["dense_lengths"]
    words = official[name].clone().requires_grad_()
    images = model.encode_images(pixels)
    texts = captions(model, words, lengths, *(dense if stage == 2 else ()))
    ids = official["image_ids" if stage == 2 else "pretrain_image_ids"]
    return images, texts, model.losses(images, texts, ids), pixels, words


@pytest.mark.usefixtures("recorded_drops")
@pytest.mark.parametrize("kind", ["sum", "hard"])
def test_training_of_stage_2_is_the_official_one(official, kind):
    model = official_model(official)
    images, texts, losses, pixels, words = trained(model, official, kind)
    close(images.local[:, 0], official["train_image_embedding"])
    close(texts.local[:, 0], official["train_caption_sum"])
    close(texts.dense.local[:, 0], official["train_dense_embedding"])
    close(model.similarity(images, texts), official["train_similarity"])
    close(losses["alignment"], official[f"align_{kind}"])
    close(losses["distillation"], official["distill_cos"])
    close(losses["loss"], official[f"loss_{kind}"])
    losses["loss"].backward()
    assert near(pixels.grad, official[f"grad_images_{kind}"])
    assert near(words.grad, official[f"grad_words_{kind}"])
    prefix = f"grad_{kind}."
    recorded = {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert len(recorded) == 4
    for name, gradient in translated(recorded).items():
        assert near(gradients[name], gradient), name


@pytest.mark.usefixtures("recorded_drops")
@pytest.mark.parametrize("kind", ["sum", "hard"])
def test_training_of_stage_1_is_the_official_one(official, kind):
    model = official_model(official, stage=1)
    images, texts, losses, pixels, words = trained(model, official, kind, stage=1)
    close(losses["loss"], official[f"pretrain_loss_{kind}"])
    if kind == "sum":
        return
    close(model.similarity(images, texts), official["pretrain_train_similarity"])
    losses["loss"].backward()
    assert near(pixels.grad, official["pretrain_grad_images_hard"])
    assert near(words.grad, official["pretrain_grad_words_hard"])
    prefix = "pretrain_grad_hard."
    recorded = {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in translated(recorded).items():
        assert near(gradients[name], gradient), name


@pytest.mark.usefixtures("recorded_drops")
@pytest.mark.parametrize("case", ["gpo", "cross", "nores"])
def test_training_with_a_flag_is_the_official_one(official, case):
    model = official_model(official, case=case)
    _, _, losses, _, words = trained(model, official, "hard")
    close(losses["loss"], official[f"{case}_loss_hard"])
    close(losses["distillation"], official[f"{case}_distill_cos"])
    losses["loss"].backward()
    assert near(words.grad, official[f"{case}_grad_words_hard"])


@pytest.mark.usefixtures("recorded_drops")
def test_warm_up_and_squared_distance_are_the_official_ones(official):
    model = official_model(official)
    warm = trained(model, official, "hard", scale=0.25)[2]
    close(warm["loss"], official["loss_hard_warmup_0.25"])
    model = official_model(official)
    squared = trained(model, official, "hard", loss="l2")[2]
    close(squared["distillation"], official["distill_l2"])
    close(squared["loss"], official["loss_hard_l2"])


@pytest.mark.usefixtures("recorded_drops")
def test_running_statistics_after_a_step_are_the_official_ones(official):
    """The teacher's move too, as released; ours keeps them."""
    model, ours = official_model(official), official_model(official, "d2s")
    before = {name: value.clone() for name, value in ours.teacher.state_dict().items()}
    trained(model, official, "sum")
    trained(ours, official, "sum")
    for name in ("txt_enc", "long_txt_enc"):
        bias = official[f"weights.{name}.mlp.layers.0.bias"]
        head = model.text_head if name == "txt_enc" else model.teacher.head
        norm, prefix = head.features.mlp[1], f"after_step.{name}.mlp.bns.0."
        close(norm.running_mean + bias, official[f"{prefix}running_mean"])
        close(norm.running_var, official[f"{prefix}running_var"])
    assert model.teacher.head.training
    assert not ours.teacher.head.training
    for name, value in ours.teacher.state_dict().items():
        assert torch.equal(value, before[name])
