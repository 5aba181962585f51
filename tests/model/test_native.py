"""The compiled scoring of the CPU against its plain form, in the methods, and where it can't be."""

from __future__ import annotations

import pytest
import torch

from lib.model import compiled, kernels, native
from tests.helpers import encode, pair_inputs, tiny_model
from tests.model.test_kernels import assert_agrees, random_case

needs_compiler = pytest.mark.skipif(not compiled.is_available(), reason="no C compiler here")


pays = native.pays


@pytest.fixture(autouse=True)
def _serve_any_size(monkeypatch):
    monkeypatch.setattr(native, "pays", lambda *sizes: True)


@needs_compiler
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("fixed", [0, 2])
@pytest.mark.parametrize(
    ("patches", "longest", "tokens"),
    [(1, 1, 1), (5, 3, 2), (49, 9, 23), (196, 14, 39), (196, 90, 39), (300, 33, 57)],
)
def test_agrees_with_the_plain_form(patches, longest, tokens, fixed, added):
    case = random_case(patches, longest, tokens, fixed, added, images=3, texts=5, width=48)
    for k in {1, (patches + 1) // 2, patches}:
        assert_agrees(case, k)
        assert_agrees(case, k, fused_counts=False)


@needs_compiler
def test_keeps_the_first_of_ties_and_skips_masked_words():
    case = random_case(20, 9, 3, 1, False, images=4, texts=6)
    case["scores"] = case["scores"].round() * torch.where(case["scores"] > 0.1, 1, -1)
    case["word_mask"] &= torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    case["word_mask"][:, 4] = True
    for k in (1, 10, 19):
        assert_agrees(case, k)


@needs_compiler
def test_threads_and_parts_change_nothing(monkeypatch):
    case = random_case(30, 7, 5, 1, True, images=5, texts=7)
    whole = kernels.fused_matches(**case, k=15)
    monkeypatch.setattr(native, "PRODUCT_BYTES", 1)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for one, other in zip(whole, kernels.fused_matches(**case, k=15), strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("spoilt", ["patches", "words", "scores", "fixed", "added", "gram"])
def test_numbers_that_are_not_finite_are_handed_to_pytorch(spoilt):
    case = random_case(9, 4, 2, 1, True)
    case["gram"] = case["patches"] @ case["patches"].transpose(1, 2)
    case[spoilt] = case[spoilt].clone()
    case[spoilt].view(-1)[3] = torch.nan
    assert kernels.fused_matches(**case, k=4) is None
    assert kernels.is_available(torch.device("cpu"))  # the next call may be served


@needs_compiler
def test_logits_too_far_apart_are_handed_to_pytorch():
    case = random_case(9, 4, 2, 1, False)
    case["logits"] *= 100
    assert kernels.fused_matches(**case, k=4) is None
    model = tiny_model("laps").eval()
    model.network.head.scale.data.fill_(1e4)
    with torch.no_grad():
        found = model.similarity(*encode(model, pair_inputs(4, "laps")))
    assert found.isfinite().all()


METHODS = [
    ("laps", {}),
    ("laps", {"sparse_ratio": 1.0}),
    ("ilaps", {"use_token_selection": 1, "token_selection_ratio": 0.5}),
    ("seps_released", {}),
    ("seps", {}),
    ("seps", {"sparse_ratio": 1.0}),
    ("seps", {"dense_side": "none"}),
]


@needs_compiler
@pytest.mark.parametrize(("method", "flags"), METHODS, ids=str)
def test_serves_the_methods(method, flags, monkeypatch):
    model = tiny_model(method, **flags).eval()
    images, texts = encode(model, pair_inputs(6, method, **flags))
    calls = []
    matches = native.matches
    monkeypatch.setattr(native, "matches", lambda *args: calls.append(1) or matches(*args))
    with torch.no_grad():
        found = model.pair_maps(images, texts)
    assert calls
    monkeypatch.setattr(kernels, "serves", lambda patches: False)
    wanted = model.pair_maps(images, texts)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key].detach(), atol=1e-5, rtol=0)


@needs_compiler
@pytest.mark.parametrize("method", ["laps", "seps", "seps_released"])
def test_the_first_pass_of_hardest_negatives_is_served_and_gradients_stay(method, monkeypatch):
    inputs = pair_inputs(6, method)
    found = {}
    for served in (True, False):
        model = tiny_model(method, detach_patches=0).train()
        model.set_hard_negatives(True)
        calls = []
        matches = native.matches
        with monkeypatch.context() as patch:
            patch.setattr(native, "matches", lambda *args: calls.append(1) or matches(*args))  # noqa: B023
            if not served:
                patch.setattr(kernels, "serves", lambda patches: False)
            loss = model.training_losses(**inputs)["loss"]
        assert bool(calls) == served
        loss.backward()
        found[served] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found[True].keys() == found[False].keys()
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("broken", ["compiler", "cache", "switched off"])
def test_without_the_compiled_code_pytorch_serves(broken, monkeypatch, tmp_path):
    if broken == "compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    if broken == "cache":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if broken == "switched off":
        monkeypatch.setenv("SEPS_NATIVE", "0")
    monkeypatch.setattr(compiled, "_loaded", compiled._loaded.__wrapped__)  # asked anew
    model = tiny_model("laps").eval()
    with torch.no_grad():
        assert not model.is_fused
        assert model.similarity(*encode(model, pair_inputs(4, "laps"))).isfinite().all()


def test_long_captions_are_left_to_the_direct_form(monkeypatch):
    assert pays(39, 196, 512, 14, 98)
    assert not pays(39, 196, 512, 88, 98)
    assert pays(115, 576, 512, 60, 288)  # ViT-384
    monkeypatch.setattr(native, "pays", pays)
    assert native.matches(**random_case(49, 90, 1, 1, False), k=25) is None
