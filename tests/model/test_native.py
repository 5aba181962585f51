"""The compiled scoring of the CPU against its plain form, in the methods, and where it can't be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.model import compiled, kernels, native
from tests.helpers import encode, pair_inputs, tiny_model
from tests.model.test_kernels import assert_agrees, plain_matches, random_case

needs_compiler = pytest.mark.skipif(not compiled.is_available(), reason="no C compiler here")


def forced(form: str):
    """Return what takes the place of `native.direct_pays`, or that itself."""
    forms = {"gram": torch.zeros_like, "direct": torch.ones_like}
    if form == "by length":
        return native.direct_pays
    return lambda words, *sizes: forms[form](words, dtype=torch.bool)


@pytest.fixture(params=["", "avx2"])
def _lanes(request, monkeypatch):
    """Both widths of vectors, where the processor has both."""
    monkeypatch.setenv("SEPS_NATIVE", request.param)
    if not compiled.is_available():
        pytest.skip("no C compiler here, or not for such a processor")


@pytest.fixture(params=["gram", "direct"])
def _form(request, monkeypatch):
    monkeypatch.setattr(native, "direct_pays", forced(request.param))


def assert_agrees_with_float64(case: dict, k: int, **options) -> None:
    """Assert that best matches are those of the plain form in float64, to 1e-5."""
    found = kernels.fused_matches(**case, k=k, **options)
    exact = {
        key: one.double() if torch.is_tensor(one) and one.is_floating_point() else one
        for key, one in case.items()
    }
    wanted = plain_matches(**exact, k=k, **options)
    words = case["word_mask"].expand_as(found[0])
    takes_part = options.get("fused_counts", True) or k < case["patches"].shape[1]
    mask = kernels.token_mask(case["fixed_mask"], case["logits"].shape[1], takes_part)
    for one, other, real in zip(found, wanted, (words, mask.expand_as(found[1])), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one[real].double(), other[real], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_lanes", "_form")
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


@pytest.mark.usefixtures("_lanes", "_form")
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_agrees_at_any_size(data):
    def size(least, most):
        return data.draw(st.integers(least, most))

    patches = size(1, 70)
    # with fewer channels sums cancel, and what float32 has left of a norm is not 1e-5
    sizes = {"images": size(1, 3), "texts": size(1, 4), "width": size(8, 70), "seed": size(0, 99)}
    case = random_case(patches, size(1, 70), size(1, 45), size(0, 3), size(0, 1) > 0, **sizes)
    assert_agrees_with_float64(case, size(1, patches), fused_counts=size(0, 1) > 0)


@pytest.mark.usefixtures("_lanes")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["gram", "direct", "by length"])
@pytest.mark.parametrize(
    ("patches", "tokens", "images", "texts"), [(196, 39, 2, 31), (576, 115, 1, 7)]
)
def test_agrees_at_real_sizes(patches, tokens, images, texts, form, threads, monkeypatch):
    monkeypatch.setattr(native, "direct_pays", forced(form))
    sizes = {"images": images, "texts": texts, "width": 512}
    case = random_case(patches, 90, tokens, 1, form == "by length", **sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_agrees_with_float64(case, patches // 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_form")
@needs_compiler
def test_many_images_are_taken_a_few_at_a_time():
    case = random_case(5, 4, 3, 1, True, images=35, texts=3)
    assert_agrees(case, 2)


@pytest.mark.usefixtures("_lanes", "_form")
def test_keeps_the_first_of_ties_and_skips_masked_words():
    case = random_case(20, 9, 3, 1, False, images=4, texts=6)
    case["scores"] = case["scores"].round() * torch.where(case["scores"] > 0.1, 1, -1)
    case["word_mask"] &= torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    case["word_mask"][:, 4] = True
    for k in (1, 10, 19):
        assert_agrees(case, k)


@pytest.mark.usefixtures("_form")
@needs_compiler
def test_scores_far_apart_leave_a_softmax_of_few():
    case = random_case(30, 5, 3, 1, False)
    case["scores"] *= torch.linspace(1, 400, 30)
    for k in (1, 15, 29):
        assert_agrees_with_float64(case, k)


def test_the_direct_form_is_for_long_captions():
    words = torch.arange(1, 130)
    for sizes in [(39, 197, 512, 98), (39, 236, 512, 98), (115, 577, 512, 288)]:  # ViT
        chosen = native.direct_pays(words, *sizes)
        assert not chosen[:12].any()
        assert chosen[80:].all()


@needs_compiler
@pytest.mark.parametrize("spoilt", ["patches", "words", "scores", "fixed", "added"])
def test_numbers_that_are_not_finite_are_handed_to_pytorch(spoilt):
    case = random_case(9, 4, 2, 1, True)
    case[spoilt] = case[spoilt].clone()
    case[spoilt].view(-1)[3] = torch.nan
    for gram in (None, case["patches"] @ case["patches"].transpose(1, 2)):
        assert kernels.fused_matches(**case, k=4, gram=gram) is None
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
