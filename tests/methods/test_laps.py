"""LAPS, released SEPS and improved LAPS against the pair-by-pair form, in float64."""

from __future__ import annotations

import argparse
from itertools import product

import pytest
import torch
from transformers import SwinConfig

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.registry import check_arguments, get_method, model_defaults
from lib.model.encoders import EncoderSource
from lib.model.slimming import WordSelection
from tests import naive_laps
from tests.helpers import encode, pair_inputs, random_tokens, tiny_args, tiny_model

SELECTIONS = [
    {},
    {"use_token_selection": 1, "token_selection_ratio": 0.4},
    {"use_token_selection": 1, "token_selection_strategy": "score"},
]
SIMILARITIES = [
    {},
    {"similarity_calc_method": "max"},
    {"similarity_calc_method": "thres", "score_threshold": 0.3},
    {"similarity_calc_method": "thres", "score_threshold": 0.0},
    {"similarity_calc_method": "attn"},
    {"similarity_calc_method": "attn", "use_learnable_temp": 1},
]
CASES = [
    *(("laps", {"detach_patches": d, "sparse_ratio": r}) for d in (0, 1) for r in (0.3, 0.5, 1.0)),
    *(("seps_released", {"detach_patches": d}) for d in (None, 0)),
    *(
        ("ilaps", {"use_cls_as_glob_embd": c, **words, **similarity})
        for c, words, similarity in product((0, 1), SELECTIONS, SIMILARITIES)
    ),
]


def double_model(method: str, **flags):
    """A model in float64 whose every parameter is off its neutral start."""
    model = tiny_model(method, shard_size=2, **flags).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.network.head.scale.fill_(3.0)
        if isinstance(getattr(model, "temperature", None), torch.nn.Parameter):
            model.temperature.fill_(0.3)
        for name, parameter in model.named_parameters():
            if "encoder" not in name and parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def double_tokens(model, cls: bool = True, seed: int = 1) -> tuple[Tokens, Tokens]:
    images = random_tokens(3, 16, 32, seed=seed, cls=cls)
    texts = random_tokens(5, 7, 32, seed=seed + 10, ragged=True)
    if model.dense_owner is not None:
        texts.dense = random_tokens(5, 9, 32, seed=seed + 20, ragged=True)
    return images, texts


def leaves(model, images, texts):
    found = {name: p for name, p in model.named_parameters() if "encoder" not in name}
    found["patches"], found["words"] = images.local, texts.local
    if images.cls is not None:
        found["cls"] = images.cls
    if texts.dense is not None:
        found["dense"] = texts.dense.local
    return found


def gradients(similarity, known):
    generator = torch.Generator().manual_seed(9)
    weights = torch.randn(similarity.shape, dtype=similarity.dtype, generator=generator)
    values = torch.autograd.grad(
        (similarity * weights).sum(), list(known.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if value is None else value
        for (name, leaf), value in zip(known.items(), values, strict=True)
    }


def assert_same(model, images, texts):
    known = leaves(model, images, texts)
    expected, actual = naive_laps.matrix(model, images, texts), model.similarity(images, texts)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    wanted, found = gradients(expected, known), gradients(actual, known)
    for name in known:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-11, rtol=1e-9, msg=name)
    return found


@pytest.mark.parametrize(("method", "flags"), CASES)
def test_equals_the_naive_form(method, flags):
    model = double_model(method, **flags)
    found = assert_same(model, *double_tokens(model))
    silent = {name for name, value in found.items() if not value.abs().sum() > 0}
    expected = set()
    if flags.get("detach_patches", 0 if method != "seps_released" else 1) in (1, None):
        expected.add("patches")
    if flags.get("use_token_selection"):
        expected |= {"word_selection.attn_mat.weight", "word_selection.attn_mat.bias"}
    # a bias of the words' queries shifts what a token sees of all words alike, and the head's last
    # bias the logits of all patches: no softmax sees it
    assert found["network.head.weight.3.bias"].abs().max() < 1e-12
    assert silent - {"i2t_attention.bias", "network.head.weight.3.bias"} == expected


@pytest.mark.parametrize("method", ["laps", "seps_released", "ilaps"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_form_without_cls(method, seed):
    model = double_model(method, detach_patches=0)
    assert_same(model, *double_tokens(model, cls=False, seed=seed))


@pytest.mark.parametrize("flags", [{}, {"similarity_calc_method": "thres", "score_threshold": 0.0}])
def test_ilaps_with_every_flag_off_is_laps(flags):
    laps, improved = double_model("laps"), double_model("ilaps", **flags)
    improved.load_state_dict(laps.state_dict())
    tokens = double_tokens(laps)
    torch.testing.assert_close(improved.similarity(*tokens), laps.similarity(*tokens))


# --- released SEPS: one dense text for several captions -------------------------------------------


def scored_texts(model, monkeypatch) -> list[int]:
    """Collect how many texts each call of `score` sees."""
    counts: list[int] = []
    score = model.score

    def counted(images, texts):
        counts.append(len(texts))
        return score(images, texts)

    monkeypatch.setattr(model, "score", counted)
    return counts


@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1, 2], [2, 0, 1, 0, 2, 0]])
def test_a_shared_dense_text_is_scored_once(order, monkeypatch):
    model = double_model("seps_released")
    model.shard_size = 100
    images, _ = double_tokens(model)
    texts = random_tokens(6, 7, 32, seed=3, ragged=True)
    different = random_tokens(3, 9, 32, seed=4, ragged=True)
    junk = torch.randn(6, 9, 32, dtype=torch.float64)  # what lies behind the end may differ
    mask = different.mask[order]
    texts.dense = Tokens(torch.where(mask[:, :, None], different.local[order], junk), mask)
    counts = scored_texts(model, monkeypatch)
    with torch.no_grad():
        similarity = model.similarity(images, texts)
        torch.testing.assert_close(similarity, naive_laps.matrix(model, images, texts))
    assert sorted(counts) == [3, 6]


def test_dense_texts_that_agree_in_part_stay_apart():
    model = double_model("seps_released")
    images, texts = double_tokens(model)
    local = texts.dense.local.detach()[:1].repeat(5, 1, 1)
    mask = torch.ones(5, 9, dtype=torch.bool)
    local[1, 8] += 1  # the same [CLS], another last word
    mask[2, 5:] = False  # the same beginning, shorter
    local[0, 5:] = 0  # the same numbers as that padding, yet real
    texts.dense = Tokens(local, mask)
    with torch.no_grad():
        together = model.similarity(images, texts)
        alone = [model.similarity(images, texts[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_a_shared_dense_text_is_encoded_once(monkeypatch):
    model = tiny_model("seps_released").eval()
    inputs = pair_inputs(method="seps_released")
    inputs["dense_ids"][1], inputs["dense_lengths"][1] = inputs["dense_ids"][0], 6
    inputs["dense_ids"][2, :6], inputs["dense_lengths"][2] = inputs["dense_ids"][0, :6], 6
    _, texts = encode(model, inputs)
    assert torch.equal(texts.dense.local[1, :6], texts.dense.local[2, :6])
    alone = model.text_encoder(inputs["dense_ids"], inputs["dense_lengths"])
    assert torch.equal(alone.mask, texts.dense.mask)
    real = alone.mask[:, :, None]
    torch.testing.assert_close(texts.dense.local * real, alone.local * real)
    rows = []
    encoder = model.text_encoder.forward
    monkeypatch.setattr(
        model.text_encoder, "forward", lambda ids, n: rows.append(len(ids)) or encoder(ids, n)
    )
    encode(model, inputs)
    assert rows == [6, 4]  # captions; dense texts 0, 1 = 2, 3, 4, and 5 = 0


# --- losses and flags -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        ("laps", (0.3 - 5 / 16) ** 2),
        ("ilaps", (0.3 - 5 / 16) ** 2),
        ("seps_released", (0.3 - 10 / 16) ** 2),
    ],
)
def test_ratio_loss(method, ratio):
    model = tiny_model(method, sparse_ratio=0.3, ratio_weight=3.0)
    losses = model.training_losses(**pair_inputs(method=method))
    assert float(losses["ratio"]) == pytest.approx(ratio, abs=1e-6)
    assert float((losses["loss"] - losses["alignment"]).detach()) == pytest.approx(
        3 * ratio, abs=1e-5
    )


@pytest.mark.parametrize("method", ["laps", "ilaps", "seps_released"])
def test_kept_patches(method):
    model = tiny_model(method, sparse_ratio=0.3).eval()
    with torch.no_grad():
        kept = model.patch_choice(*encode(model, pair_inputs(method=method))).kept["sparse"]
    assert kept.shape == (6, 6, 16)
    assert (kept.sum(-1) == 5).all()


@pytest.mark.parametrize(
    ("method", "flags", "detached"),
    [
        ("seps_released", {}, True),
        ("seps_released", {"detach_patches": 0}, False),
        ("laps", {}, False),
        ("laps", {"detach_patches": 1}, True),
        ("ilaps", {}, False),
    ],
)
def test_who_detaches_patches_by_default(method, flags, detached):
    assert tiny_model(method, **flags).detach_patches is detached


@pytest.mark.parametrize("words", [1, 2, 6, 11])
def test_word_selection_keeps_cls_and_the_stated_share(words):
    tokens = torch.randn(4, 12, 8)
    mask = torch.arange(12)[None].expand(4, -1) < words
    kept = WordSelection(8, "ratio", 0.8)(tokens, mask)
    assert kept[:, 0].all()
    assert (kept <= mask).all()
    assert (kept.sum(1) == 1 + -(-(words - 1) * 8 // 10)).all()
    with pytest.raises(ValueError, match="ratio, score"):
        WordSelection(8, "best")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"similarity_calc_method": "mean"}, "--similarity_calc_method mean: choose one of max"),
        ({"token_selection_strategy": "best"}, "--token_selection_strategy best"),
        ({"token_selection_ratio": 1.5}, "--token_selection_ratio"),
        ({"score_threshold": -0.1}, "--score_threshold"),
        ({"sparse_ratio": 0.0}, "--sparse_ratio"),
    ],
)
def test_flags_out_of_range(flags, message):
    args = tiny_args("ilaps", **flags)
    with pytest.raises(InputError, match=message):
        check_arguments(args)


def test_cls_as_global_embedding_needs_a_cls():
    args = tiny_args("ilaps", use_cls_as_glob_embd=1, vit_type="some/swin")
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    source = EncoderSource("some/swin", "tiny", 32, 32, 120, 40, image_config=swin.to_dict())
    with pytest.raises(InputError, match=r"some/swin has no \[CLS\]"):
        get_method("ilaps").from_args(args, source)


def test_flags_of_the_improved_laps_report():
    parser = argparse.ArgumentParser()
    get_method("ilaps").add_arguments(parser.add_argument_group("ilaps"))
    command = (
        "--use_cls_as_glob_embd 1 --use_token_selection 1 --token_selection_strategy ratio "
        "--token_selection_ratio 0.8 --similarity_calc_method attn --use_learnable_temp 0"
    )
    args = parser.parse_args(command.split())
    assert (args.use_cls_as_glob_embd, args.use_token_selection, args.use_learnable_temp) == (
        1,
        1,
        0,
    )
    assert (args.token_selection_ratio, args.score_threshold) == (0.8, 0.7)
    defaults = model_defaults()
    assert defaults.use_cls_as_glob_embd is None
    assert defaults.similarity_calc_method is None
