"""SEPS against the pair-by-pair form of tests/naive_seps.py, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import lib.methods.seps as seps_module
from lib.model.losses import ratio_loss
from lib.model.slimming import (
    Aggregation,
    dropped_sum,
    gumbel_decision,
    peak_weights,
    selected_sums,
    top_k_mask,
)
from tests import naive_seps
from tests.helpers import encode, pair_inputs, random_tokens, tiny_model
from tools.benchmark.cases import Case

OPTIONS = list(
    product(
        ("topk", "gumbel"), ("topk_mean", "topk_mlp", "mean"), ("image", "caption", "none"), (0, 1)
    )
)


def double_tokens(model, cls: bool):
    """Random tokens in float64 that fit the tiny model, dense text at its owner."""
    images = random_tokens(3, 16, 32, seed=1, cls=cls)
    texts = random_tokens(4, 7, 32, seed=2, ragged=True)
    if model.dense_owner is not None:
        owner = images if model.dense_owner == "image" else texts
        owner.dense = random_tokens(len(owner), 9, 32, seed=3, ragged=True)
    return images, texts


def leaves(model, images, texts):
    found = {name: p for name, p in model.named_parameters() if "encoder" not in name}
    found["patches"], found["words"] = images.local, texts.local
    if images.cls is not None:
        found["cls"] = images.cls
    return found


@pytest.mark.parametrize(("selection", "relevance", "dense_side", "detach"), OPTIONS)
def test_equals_the_naive_form(selection, relevance, dense_side, detach):
    model = tiny_model(
        selection=selection,
        relevance=relevance,
        dense_side=dense_side,
        detach_patches=detach,
        shard_size=2,
    ).double()
    model.eval()  # Gumbel selection is a plain top-k here
    images, texts = double_tokens(model, cls=bool(detach))
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    known = leaves(model, images, texts)

    def gradients(similarity):
        values = torch.autograd.grad(
            (similarity * weights).sum(), list(known.values()), allow_unused=True
        )
        return dict(zip(known, values, strict=True))

    expected = naive_seps.matrix(model, images, texts)
    found = model.similarity(images, texts)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    want, have = gradients(expected), gradients(found)
    for name in known:
        if want[name] is None or have[name] is None:
            empty = [g for g in (want[name], have[name]) if g is not None]
            assert all(float(g.abs().max()) == 0 for g in empty), name
        else:
            torch.testing.assert_close(have[name], want[name], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("sparse_ratio", [0.05, 1.0])
def test_one_patch_kept_and_all_kept(sparse_ratio):
    model = tiny_model(sparse_ratio=sparse_ratio).double().eval()
    images, texts = double_tokens(model, cls=True)
    torch.testing.assert_close(
        model.similarity(images, texts), naive_seps.matrix(model, images, texts)
    )


def test_ties_keep_the_first_patches():
    model = tiny_model(dense_side="none").double().eval()
    images, texts = double_tokens(model, cls=False)
    with torch.no_grad():
        images.local[:, 8:] = images.local[:, :8]  # every score appears twice
    torch.testing.assert_close(
        model.similarity(images, texts), naive_seps.matrix(model, images, texts)
    )


@pytest.mark.parametrize("dense_side", ["image", "caption", "none"])
@pytest.mark.parametrize("relevance", ["topk_mean", "topk_mlp", "mean"])
def test_gradcheck(dense_side, relevance, monkeypatch):
    model = tiny_model(dense_side=dense_side, relevance=relevance, embed_size=32).double().eval()
    images, texts = double_tokens(model, cls=True)

    def similarity(patches, words, cls):
        images.local, texts.local, images.cls = patches, words, cls
        return model.similarity(images, texts)

    inputs = (images.local, texts.local, images.cls)
    frozen = _with_frozen_scores(model, similarity, inputs, monkeypatch)
    assert torch.autograd.gradcheck(frozen, inputs, fast_mode=True)


def _with_frozen_scores(model, function, inputs, monkeypatch):
    """`function` with the attention scores recorded once and replayed, as `no_grad` means it."""
    model.shard_size = 100  # a single chunk is not computed again in the backward pass
    recorded, original = [], seps_module.min_max

    def record(scores):
        recorded.append(original(scores).detach())
        return recorded[-1]

    monkeypatch.setattr(seps_module, "min_max", record)
    function(*inputs)

    def run(*values):
        replay = iter(recorded)
        monkeypatch.setattr(seps_module, "min_max", lambda scores: next(replay))
        return function(*values)

    return run


def test_gumbel_training_sends_gradient_to_the_scores_and_frees_the_ratio():
    model = tiny_model(selection="gumbel", ratio_weight=1.0).train()
    torch.manual_seed(3)
    losses = model.training_losses(**pair_inputs())
    losses["loss"].backward()
    assert model.patch_score.mlp[1].weight.grad.abs().sum() > 0
    assert float(losses["ratio"]) > 0
    # the ratio term alone reaches the predicted score, as it can't under hard top-k
    model.zero_grad()
    maps = model.pair_maps(*encode(model, pair_inputs()))
    ratio_loss(maps["kept_sparse"], maps["kept_dense"], 0.5, 0.5, 0.5).backward()
    assert model.patch_score.mlp[1].weight.grad.abs().sum() > 0


def test_gumbel_decisions_are_centred_on_the_k_th_significance():
    torch.manual_seed(0)
    significance = torch.tensor([0.72, 0.5, 0.7, 0.9, 0.8]).expand(4000, 5)
    rates = gumbel_decision(significance, k=2, tau=0.1).mean(0)
    centre = 0.76  # between the second and the third
    torch.testing.assert_close(
        rates, ((significance[0] - centre) / 0.1).sigmoid(), atol=0.03, rtol=0
    )
    none_likely = gumbel_decision(torch.zeros(200, 5), k=1, tau=1e-6)
    assert (none_likely.sum(-1) >= 1).all()
    assert (gumbel_decision(significance, k=5, tau=0.1) == 1).all()


def test_gumbel_keeps_what_evaluation_keeps():
    """At ViT-224 and the default temperature six of seven; a coin flip would be one of two."""
    case = Case("seps", "sum", 196, None, images=6, captions=20)
    model, images, texts = case.model(), case.image_tokens(), case.text_tokens()
    with torch.no_grad():
        prepared, embeddings = model.prepare_images(images), model.prepare_texts(texts).embedding
        significance = model._significance(prepared, embeddings)
    torch.manual_seed(0)
    kept = gumbel_decision(significance, model.kept, model.gumbel_tau) > 0.5
    top = top_k_mask(significance, model.kept)
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert (kept & top).sum() / kept.sum() > 0.8


@pytest.mark.parametrize("tau", [1e-6, 10.0])
def test_the_flag_sets_the_temperature(tau):
    model = tiny_model(selection="gumbel", gumbel_tau=tau)
    images, texts = encode(model, pair_inputs())
    torch.manual_seed(0)
    in_training = model.train().similarity(images, texts)
    in_evaluation = model.eval().similarity(images, texts)
    near = torch.allclose(in_training, in_evaluation, atol=1e-5)
    assert near == (tau == 1e-6)  # near 0 it is top-k


@pytest.mark.parametrize("far", [False, True], ids=["peaks", "softmax"])
def test_the_gumbel_decision_has_a_gradient_in_the_aggregation(far):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    logits[0, 0, 0] += 100.0 * far  # then the exponentials of the whole image do not serve
    decision = (torch.rand(2, 4, 8, generator=generator) < 0.5).double()
    decision[..., 0] = 1
    outer = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    peaks = peak_weights(logits)
    assert (peaks is None) == far

    def ours(kept):
        sums = selected_sums(Aggregation(logits, peaks), kept)
        return sums.weights if sums.mass is None else sums.weights / sums.mass[..., None]

    def plain(kept):  # the decision multiplies inside the softmax
        mass = kept[:, :, None] * (logits - logits.amax(-1, keepdim=True))[:, None].exp()
        return mass / mass.sum(-1, keepdim=True)

    found, wanted = (
        torch.autograd.grad((way(kept) * outer).sum(), kept)[0]
        for way, kept in (
            (ours, decision.requires_grad_()),
            (plain, decision.detach().clone().requires_grad_()),
        )
    )
    where = decision.detach() > 0  # of what is dropped, a large logit's gradient is cut
    assert found[where].abs().sum() > 0
    torch.testing.assert_close(found[where], wanted[where], atol=1e-10, rtol=1e-8)


def test_the_scores_learn_through_the_gumbel_aggregation_alone(monkeypatch):
    """What the fused tokens would hand on is cut off."""
    monkeypatch.setattr(
        seps_module, "dropped_sum", lambda scores, kept: dropped_sum(scores.detach(), kept.detach())
    )
    model = tiny_model(selection="gumbel", ratio_weight=0.0).train()
    torch.manual_seed(3)
    model.training_losses(**pair_inputs())["loss"].backward()
    assert model.patch_score.mlp[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_flag_weighs_the_ratio_loss(weight):
    model = tiny_model(selection="gumbel", ratio_weight=weight, gumbel_tau=1.0).train()
    torch.manual_seed(3)
    losses = model.training_losses(**pair_inputs())
    assert float(losses["ratio"]) > 1e-6
    added = float((losses["loss"] - losses["alignment"]).detach())
    assert added == pytest.approx(weight * float(losses["ratio"]), rel=1e-3, abs=1e-7)


def test_hard_top_k_has_a_constant_ratio_loss():
    losses = tiny_model().training_losses(**pair_inputs())
    assert float(losses["kept_sparse"]) == pytest.approx(0.5)
    assert float(losses["ratio"]) == pytest.approx(0.0, abs=1e-12)


def test_predicted_score_learns_through_the_fused_token():
    model = tiny_model(selection="topk")
    model.training_losses(**pair_inputs())["loss"].backward()
    for name, parameter in model.patch_score.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_image_side_dense_text_changes_the_image_alone():
    model = tiny_model(dense_side="image").eval()
    inputs = pair_inputs()
    images, texts = encode(model, inputs)
    before = model.similarity(images, texts)
    inputs["dense_ids"][0] = (inputs["dense_ids"][0] + 17) % 100 + 5
    images, texts = encode(model, inputs)
    after = model.similarity(images, texts)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:])


def test_protocol_names():
    expected = {"image": "image", "caption": "oracle", "none": "none"}
    assert {side: tiny_model(dense_side=side).protocol for side in expected} == expected
