"""Losses and gradients at the sizes people train at, 196 patches of 512 channels, against loops.

Small shapes take other branches: there the direct form is the cheaper one, and what is wrong with
the Gram form alone, or inside `torch.vmap`, goes unseen.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import softplus

from lib.batch import Tokens, length_mask
from lib.methods.registry import get_method, method_names
from lib.model import gram
from tests import naive_baselines, naive_laps, naive_seps
from tests.helpers import tiny_model

PAIRS, PATCHES, WIDTH = 8, 196, 512
LENGTHS = [3, 14, 9, 40, 5, 23, 12, 17]  # words: some favour the Gram form, some the direct one
DENSE_LENGTHS = [31, 8, 50, 17, 29, 40, 12, 31]
IMAGE_IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
# one product a pair: there is no faster path to test; the loss of avse reads pooled embeddings
POOLED = {name for name in method_names() if get_method(name).scores_repeat is False} | {"avse"}


def seps_matrix(model, images, texts):
    """SEPS pair by pair, with the weighted dense match where the model has one."""
    matrix = naive_seps.matrix(model, images, texts)
    if model.dense_match is None:
        return matrix
    raw = model.dense_match.raw_weight
    if model.dense_match.gate is not None:
        pixels, words = (
            torch.stack([row[real].mean(0) for row, real in zip(one.local, one.mask, strict=True)])
            for one in (images, images.dense)
        )
        agree = pixels / pixels.norm(dim=1, keepdim=True) * words / words.norm(dim=1, keepdim=True)
        raw = raw + agree @ model.dense_match.gate.weight.T
    weight = softplus(raw)
    return matrix + weight * naive_baselines.dense_matrix(model, images.dense, texts)


SLIMMING = {"laps", "ilaps", "seps_released", "seps"}
PLAIN = {
    "laps": naive_laps.matrix,
    "ilaps": naive_laps.matrix,
    "seps_released": naive_laps.matrix,
    "seps": seps_matrix,
    "scan": naive_baselines.scan_matrix,
    "chan": naive_baselines.chan_matrix,
    "dense_text": naive_baselines.dense_matrix,
}
CASES = [  # a method is in by its registration
    *((method, ()) for method in method_names() if method not in POOLED),
    ("laps", (("without_cls", True),)),
    ("ilaps", (("similarity_calc_method", "attn"), ("use_learnable_temp", 1))),
    ("seps", (("dense_side", "caption"),)),
    ("seps", (("dense_match", "max_mean"), ("relevance", "topk_mlp"))),
    ("seps", (("dense_match", "max_mean"), ("match_gate", "image"))),
]


def tokens(lengths: list[int], seed: int, cls: bool = False) -> Tokens:
    """Random float64 tokens of so many rows, real up to each length."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), WIDTH)
    local = torch.randn(shape, generator=generator, dtype=torch.float64)
    head = torch.randn(len(lengths), 1, WIDTH, generator=generator, dtype=torch.float64)
    mask = length_mask(torch.tensor(lengths), shape[1])
    return Tokens(local.requires_grad_(), mask, head.requires_grad_() if cls else None)


@functools.cache
def case(method: str, flags: tuple):
    """The method in float64 off its neutral start, images, captions, everything with a gradient."""
    flags = dict(flags)
    without_cls = flags.pop("without_cls", False)
    flags = {"embed_size": WIDTH, "img_res": 224, "tiny_patch_size": 16, **flags}
    model = tiny_model(method, detach_patches=0, **flags).double().train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" not in name and parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.add_(size * noise)
    images = tokens([PATCHES] * PAIRS, 1, cls=not without_cls)
    texts = tokens(LENGTHS, 2, cls=True)  # sgr reads it
    if model.dense_owner is not None:
        dense = tokens(DENSE_LENGTHS, 3)
        if model.uses_pixels:
            (images if model.dense_owner == "image" else texts).dense = dense
        else:
            images = dense
    return model, images, texts


def forms(method: str) -> list[bool]:
    """Whether a method chooses between the Gram form and the direct one."""
    return [True, False] if method in SLIMMING else [False]


def leaves(model, images: Tokens, texts: Tokens) -> dict[str, torch.Tensor]:
    found = {
        f"model.{name}": one for name, one in model.named_parameters() if "encoder" not in name
    }
    for name, side in {
        "images": images,
        "texts": texts,
        "dense": images.dense or texts.dense,
    }.items():
        if side is not None:
            found[f"{name}.local"] = side.local
            found[f"{name}.cls"] = side.cls
    return {name: one for name, one in found.items() if one is not None}


def plain_loss(matrix: torch.Tensor, hardest: bool, margin: float = 0.2) -> torch.Tensor:
    """SPEC 6, entry by entry."""
    total = matrix.new_zeros(())
    for i in range(PAIRS):
        wrong = [j for j in range(PAIRS) if IMAGE_IDS[i] != IMAGE_IDS[j]]
        for scores in (matrix[i, wrong], matrix[wrong, i]):
            costs = [(margin + score - matrix[i, i]).clamp(min=0) for score in scores]
            total = total + (max(costs) if hardest else sum(costs))
    return total


def gradients(loss: torch.Tensor, over: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(over.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if one is None else one
        for (name, leaf), one in zip(over.items(), found, strict=True)
    }


@functools.cache
def expected(method: str, flags: tuple):
    """Loss and gradients of the loop over pairs, by whether the hardest negatives are taken."""
    model, images, texts = case(method, flags)
    matrix = PLAIN.get(method, naive_baselines.one_by_one)(model, images, texts)
    over = leaves(model, images, texts)
    losses = {hardest: plain_loss(matrix, hardest) for hardest in (False, True)}
    return {key: (loss.detach(), gradients(loss, over)) for key, loss in losses.items()}


@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
@pytest.mark.parametrize(
    ("method", "flags", "with_gram"),
    [(*one, with_gram) for one in CASES for with_gram in forms(one[0])],
    ids=str,
)
def test_losses_have_the_loops_gradient(method, flags, with_gram, hardest, monkeypatch):
    calls = []
    gram_form = gram.PairTokens._gram_form
    monkeypatch.setattr(
        gram.PairTokens, "_gram_form", lambda *args: calls.append(1) or gram_form(*args)
    )
    monkeypatch.setattr(gram, "gram_pays", lambda *sizes: with_gram)  # the form is forced
    model, images, texts = case(method, flags)
    monkeypatch.setattr("lib.methods.pairs.PAIRS_AT_ONCE", 16)  # of up to 24: checkpointed parts
    model.set_hard_negatives(hardest)
    losses = model.losses(images, texts, IMAGE_IDS)
    loss, wanted = expected(method, flags)[hardest]
    torch.testing.assert_close(losses["alignment"], loss, atol=1e-9, rtol=1e-9)
    found = gradients(losses["loss"], leaves(model, images, texts))
    assert sum(one.abs().sum() > 0 for one in wanted.values()) >= 2
    for name, one in wanted.items():
        atol = 1e-12 + 1e-8 * float(one.abs().max())
        torch.testing.assert_close(found[name], one, atol=atol, rtol=0, msg=name)
    assert bool(calls) == (with_gram and method in SLIMMING)  # or a form is compared with itself
