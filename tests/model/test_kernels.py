"""The fused evaluation kernel against its plain form, and that against the methods' own score.

The kernel runs on a GPU, or anywhere through Triton's interpreter, which has to be switched on
before Triton is imported: one test runs the interpreted ones in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from lib.batch import length_mask
from lib.model import compiled, kernels
from lib.model.alignment import NEGATIVE_SLOPE, best_matches, masked_average
from lib.model.kernels import fused_matches, is_available, token_mask
from lib.model.slimming import global_scores, min_max, selected_softmax, top_k_mask
from lib.program import is_out_of_memory
from tests.helpers import encode, pair_inputs, tiny_model

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="run by test_kernels_through_the_interpreter, in its own process"
)
TOLERANCE = 1e-5


def plain_matches(
    scores: Tensor,
    logits: Tensor,
    patches: Tensor,
    words: Tensor,
    word_mask: Tensor,
    fixed: Tensor,
    fixed_mask: Tensor,
    k: int,
    added: Tensor | None = None,
    fused_counts: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return what `fused_matches` does, written plainly: tokens built, normalised, multiplied."""
    decision = top_k_mask(scores, k)
    weights = selected_softmax(logits[:, None], decision[:, :, None])  # (B_v, T, N_c, L)
    local = weights @ patches[:, None]  # (B_v, T, N_c, C)
    if added is not None:
        local = local + added[:, None]
    fused = (selected_softmax(scores, ~decision) @ patches)[:, :, None]  # (B_v, T, 1, C)
    same = fixed[:, None].expand(-1, local.shape[1], -1, -1)  # (B_v, T, F, C)
    tokens = normalize(torch.cat([local, fused, same], 2), dim=-1)
    affinity = leaky_relu(torch.einsum("vtnc,tmc->vtnm", tokens, words), NEGATIVE_SLOPE)
    takes_part = fused_counts or k < scores.shape[-1]
    return best_matches(affinity, token_mask(fixed_mask, local.shape[2], takes_part), word_mask)


def random_case(
    patches: int,
    longest: int,
    tokens: int,
    fixed: int,
    added: bool,
    *,
    images: int = 1,
    texts: int = 2,
    width: int = 16,
    device: str = "cpu",
    seed: int = 0,
) -> dict:
    """Keyword arguments of `fused_matches`, without k; caption lengths are ragged."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    lengths = torch.randint(1, longest + 1, (texts,), generator=generator)
    lengths[0] = longest
    return {
        "scores": normal(images, texts, patches),
        # the last logits are the largest: a softmax over blocks has to start anew
        "logits": 3 * normal(images, tokens, patches) + torch.linspace(0, 8, patches).to(device),
        "patches": normal(images, patches, width) + normal(images, 1, width),
        "words": normalize(normal(texts, longest, width), dim=-1),
        "word_mask": length_mask(lengths, longest).to(device),
        "fixed": normalize(normal(images, fixed, width), dim=-1),
        "fixed_mask": normal(images, fixed) > 0,
        "added": normal(images, tokens, width) / 2 if added else None,
    }


def assert_agrees(case: dict, k: int, tolerance: float = TOLERANCE, **options) -> None:
    """Assert that kernel and plain form agree wherever words and tokens are real."""
    found = fused_matches(**case, k=k, **options)
    wanted = plain_matches(**case, k=k, **options)
    real = case["word_mask"].expand_as(wanted[0])
    takes_part = options.get("fused_counts", True) or k < case["patches"].shape[1]
    mask = token_mask(case["fixed_mask"], case["logits"].shape[1], takes_part)
    for one, other, where in zip(found, wanted, (real, mask.expand_as(wanted[1])), strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert one.isfinite().all()
        torch.testing.assert_close(one[where], other[where], atol=tolerance, rtol=0)


# --- the plain form is what the methods compute --------------------------------------------------


def laps_arguments(model, images, texts) -> dict:
    """What LAPS and its kin would pass."""
    scores, _ = model.network.select(images, texts.embedding)
    fixed = images.fixed
    fixed_mask = fixed.new_ones(fixed.shape[:2], dtype=torch.bool)
    return {"scores": scores, "fixed": fixed, "fixed_mask": fixed_mask, "k": model.network.kept}


def seps_arguments(model, images, texts) -> dict:
    """What SEPS would pass, its dense text absent or on the side of the image."""
    attention = min_max(global_scores(images.patches, texts.embedding))
    arguments = {
        "scores": images.base[:, None] + model.beta * attention,
        "fixed": images.fixed,
        "fixed_mask": images.fixed_mask,
        "k": model.kept,
        "fused_counts": False,
    }
    if images.image_dense is not None:
        arguments["added"] = images.image_dense.weights @ images.patches
    return arguments


@pytest.mark.parametrize("sparse_ratio", [0.5, 1.0])
@pytest.mark.parametrize(("method", "dense"), [("laps", ""), ("seps", "image"), ("seps", "none")])
@torch.no_grad()
def test_plain_form_is_the_similarity_of_the_method(method, dense, sparse_ratio):
    flags = {"sparse_ratio": sparse_ratio} | ({"dense_side": dense} if dense else {})
    if dense:
        flags["relevance"] = "mean"
    model = tiny_model(method, **flags).eval()
    tokens = encode(model, pair_inputs(4, method, **flags))
    images, texts = model.prepare_images(tokens[0]), model.prepare_texts(tokens[1])
    arguments = (laps_arguments if method == "laps" else seps_arguments)(model, images, texts)
    arguments |= {"logits": images.aggregation.logits, "patches": images.patches}
    arguments |= {"words": texts.words, "word_mask": texts.word_mask}
    for_words, for_tokens = plain_matches(**arguments)
    takes_part = arguments.get("fused_counts", True) or arguments["k"] < images.patches.shape[1]
    mask = token_mask(arguments["fixed_mask"], images.aggregation.logits.shape[1], takes_part)
    found = masked_average(for_words, texts.word_mask) + masked_average(for_tokens, mask)
    wanted = model.score(images, texts)["similarity"]
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_a_cpu_without_compiled_code_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    assert not is_available(torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        fused_matches(**random_case(5, 3, 2, 1, False), k=2)


PROGRAMS = ("order_patches", "match_aggregated", "match_fused")


class Launched:
    """A program that is launched and does nothing, or can't be built."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __getitem__(self, grid):
        if self.broken:
            raise RuntimeError("Failed to find C compiler.\nmore")
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("broken", [*PROGRAMS, None])
def test_the_probe_builds_every_program_and_tells_once(broken, monkeypatch, capsys):
    pytest.importorskip("triton")
    for name in PROGRAMS:
        monkeypatch.setattr(kernels, name, Launched(name == broken))
    kernels._builds.cache_clear()
    try:
        assert kernels._builds(torch.device("cpu")) == (broken is None)
        assert kernels._builds(torch.device("cpu")) == (broken is None)
    finally:
        kernels._builds.cache_clear()
    told = "warning: no fused scoring, PyTorch does it (Failed to find C compiler.)\n"
    assert capsys.readouterr().err == ("" if broken is None else told)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_is_of_float32_under_autocast_too(dtype, monkeypatch):
    """With a product of another type Triton refuses, and PyTorch served the whole process."""
    pytest.importorskip("triton")
    given = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *some, **named: given.extend([*some, *named.values()])

    for name in PROGRAMS:
        monkeypatch.setattr(kernels, name, Recorded())
    kernels._builds.cache_clear()
    try:
        with torch.autocast("cpu", dtype):
            assert kernels._builds(torch.device("cpu"))
    finally:
        kernels._builds.cache_clear()
    floats = {one.dtype for one in given if torch.is_tensor(one) and one.is_floating_point()}
    assert floats == {torch.float32}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_a_full_gpu_is_no_program_that_can_not_be_built(error, monkeypatch, capsys):
    def full(*some, **named):
        raise error

    monkeypatch.setattr(kernels, "_matches", full)
    monkeypatch.setattr(kernels, "_failed", set())
    kernels._builds.cache_clear()
    for call in (kernels._builds, lambda device: kernels._tried(torch.ones(1, device=device))):
        with pytest.raises(type(error)):
            call(torch.device("cpu"))
    assert is_out_of_memory(error)
    assert not kernels._failed
    assert kernels._builds.cache_info().currsize == 0
    assert capsys.readouterr().err == ""


def test_a_fault_in_a_helper_of_a_program_is_named(capsys):
    inner = RuntimeError("at 7:14:\n    tile = tl.load(x)\n              ^\nx is not defined")
    outer = RuntimeError("at 38:25:\n    top = helper()\n          ^")
    outer.__cause__ = inner
    kernels._tell(outer)
    assert capsys.readouterr().err.endswith("does it (x is not defined)\n")


@pytest.mark.parametrize(("method", "flags"), [("laps", {}), ("seps", {}), ("seps_released", {})])
@torch.no_grad()
def test_a_program_that_fails_at_a_models_size_falls_back(method, flags, monkeypatch, capsys):
    pytest.importorskip("triton")
    model = tiny_model(method, **flags).eval()
    images, texts = encode(model, pair_inputs(4, method, **flags))
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    wanted = model.similarity(images, texts)
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_interpreted", lambda: True)
    for name in PROGRAMS:
        monkeypatch.setattr(kernels, name, Launched(broken=True))
    assert model.is_fused
    torch.testing.assert_close(model.similarity(images, texts), wanted, atol=TOLERANCE, rtol=0)
    assert not model.is_fused
    assert capsys.readouterr().err.count("no fused scoring") == 1


def test_tiles_are_small_enough_for_registers():
    pytest.importorskip("triton")
    assert kernels.block_sizes(39, 14) == (32, 16)
    assert kernels.block_sizes(115, 90) == (32, 32)
    assert kernels.block_sizes(1, 1) == (16, 16)


def test_the_module_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ImportError
    spec = importlib.util.spec_from_file_location("kernels_alone", kernels.__file__)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernels_alone", alone)  # dataclasses look there
    spec.loader.exec_module(alone)
    assert not alone.is_available(torch.device("cuda"))
    with torch.no_grad():
        assert alone.serves(torch.zeros(1)) == compiled.is_available()


# --- the kernel through the interpreter ----------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="they run in this process")
def test_kernels_through_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    done = subprocess.run(
        [*command, "-k", "interpreter_", __file__],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@interpreted
@pytest.mark.parametrize(
    ("shape", "k", "images", "texts"),
    [  # L, M, N_c, F, whether vectors are added; few pairs, each takes a fifth of a second
        ((5, 1, 1, 0, False), 1, 1, 1),
        ((5, 9, 7, 2, True), 4, 2, 2),
        ((7, 4, 3, 1, False), 3, 2, 2),
        ((36, 9, 7, 2, False), 18, 1, 2),
        ((36, 5, 4, 1, True), 20, 1, 2),
        ((90, 20, 5, 1, True), 70, 1, 2),  # two blocks of columns of the Gram matrix
        ((7, 70, 3, 1, False), 3, 1, 1),  # two blocks of words
        ((7, 3, 70, 0, True), 3, 1, 1),  # two blocks of tokens
    ],
)
def test_interpreter_agrees_with_the_plain_form(shape, k, images, texts):
    assert_agrees(random_case(*shape, images=images, texts=texts), k)


@interpreted
@pytest.mark.parametrize(("k", "fused_counts"), [(7, True), (9, False)])
def test_interpreter_where_nothing_is_dropped(k, fused_counts):
    case = random_case(7, 4, 1, 1, False)
    # one token beside the zero, far from every word: whether the zero takes part is seen
    case["patches"] -= 3 * case["words"].sum((0, 1))
    case["fixed_mask"][:] = False
    assert_agrees(case, k, fused_counts=fused_counts)
    lowest = plain_matches(**case, k=k, fused_counts=fused_counts)[0].min()
    assert lowest == 0 if fused_counts else lowest < 0


@interpreted
@pytest.mark.parametrize("k", [2, 5])
def test_interpreter_keeps_the_first_of_ties(k):
    case = random_case(7, 2, 2, 0, False, images=2, seed=k)
    case["scores"] = torch.tensor(
        [
            [[-0.0, 0.0, -0.0, 0.0, -1.0, 0.0, -0.0], [-1.5, -1.5, -1.0, -1.5, -1.0, -1.5, -1.0]],
            [[2.0] * 7, [1e-38, -1e-38, 0.0, -3e38, 3e38, 1e-38, 0.0]],
        ]
    )
    assert_agrees(case, k)


@interpreted
def test_interpreter_survives_zero_patches_and_distant_logits():
    case = random_case(7, 4, 3, 1, False, images=2, texts=1)
    case["patches"][0] = 0
    case["logits"] *= 100  # dropped logits lie hundreds above the kept ones
    assert_agrees(case, 3)


@interpreted
def test_interpreter_ignores_masked_words():
    case = random_case(7, 6, 3, 1, True)
    case["word_mask"] = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    before = fused_matches(**case, k=3)
    case["words"] = case["words"].masked_fill(~case["word_mask"][..., None], 1e3)
    after = fused_matches(**case, k=3)
    assert torch.equal(before[0][:, case["word_mask"]], after[0][:, case["word_mask"]])
    assert torch.equal(before[1], after[1])
    assert_agrees(case, 3)


@interpreted
def test_interpreter_takes_captions_in_parts(monkeypatch):
    case = random_case(7, 3, 2, 2, True, texts=3)
    whole = fused_matches(**case, k=3)
    monkeypatch.setattr(kernels, "PRODUCT_BYTES", 2 * 4 * (7 + 2 + 2) * 3)  # two captions
    for one, other in zip(whole, fused_matches(**case, k=3), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@interpreted
def test_interpreter_takes_views_and_half_precision_under_autocast():
    case = random_case(7, 4, 3, 1, False)
    wide = {key: case[key].bfloat16().float() for key in ("patches", "words")}
    wanted = plain_matches(**{**case, **wide}, k=3)
    case |= {key: value.bfloat16() for key, value in wide.items()}
    case["logits"] = case["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    case["scores"] = case["scores"].repeat_interleave(2, 1)[:, ::2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_matches(**case, k=3)
    real = case["word_mask"].expand_as(wanted[0])
    torch.testing.assert_close(found[0][real], wanted[0][real], atol=TOLERANCE, rtol=0)


@interpreted
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("laps", {}),
        ("laps", {"sparse_ratio": 1.0}),
        ("ilaps", {"use_token_selection": 1, "token_selection_ratio": 0.5}),
        ("seps_released", {}),
        ("seps", {}),
        ("seps", {"sparse_ratio": 1.0}),
        ("seps", {"dense_side": "none"}),
    ],
    ids=str,
)
def test_interpreter_serves_the_methods(method, flags, cls, monkeypatch):
    model = tiny_model(method, **flags).eval()
    images, texts = encode(model, pair_inputs(4, method, **flags))
    images.cls = images.cls if cls else None
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape[:2].numel())
        return fused_matches(*args, **kwargs)

    monkeypatch.setattr(kernels, "fused_matches", counted)
    with torch.no_grad():
        found = model.pair_maps(images, texts)
    assert sum(calls) == (28 if method == "seps_released" else 16)  # 4 x 3 different dense texts
    assert max(calls) > model.shard_size  # large calls, not the chunks of training
    monkeypatch.setattr(kernels, "serves", lambda patches: False)
    wanted = model.pair_maps(images, texts)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key].detach(), atol=TOLERANCE, rtol=0)
    model.train()
    calls.clear()
    model.set_hard_negatives(True)
    monkeypatch.setattr(kernels, "serves", lambda patches: not torch.is_grad_enabled())
    model.training_losses(**pair_inputs(4, method, **flags))["loss"].backward()
    assert sum(calls) <= 28  # all pairs once, without a graph; with one none


@interpreted
def test_interpreter_refuses_to_lose_a_gradient():
    case = random_case(5, 3, 2, 1, False)
    case["patches"].requires_grad_()
    with pytest.raises(ValueError, match="backward pass on the CPU in float32 alone"):
        fused_matches(**case, k=2)
    with torch.no_grad():
        fused_matches(**case, k=2)


# --- the kernel on a GPU -------------------------------------------------------------------------


def gpu_case(*shape, **sizes) -> dict:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("triton")
    assert is_available(torch.device("cuda"))
    return random_case(*shape, width=512, device="cuda", **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("longest", [9, 24, 33, 160])
@pytest.mark.parametrize(
    ("patches", "tokens"), [(196, 39), (576, 115), (49, 9), (49, 23), (144, 28)]
)
def test_gpu_agrees_with_the_plain_form(patches, tokens, longest, added):
    case = gpu_case(patches, longest, tokens, 2, added, images=5, texts=7)
    for k in (1, patches // 2, patches):
        assert_agrees(case, k)
        assert_agrees(case, k, fused_counts=False)


@pytest.mark.gpu
def test_gpu_keeps_the_first_of_ties():
    case = gpu_case(196, 12, 39, 1, False, images=8, texts=16)
    case["scores"] = case["scores"].round() * torch.where(case["scores"] > 0.1, 1, -1)
    for k in (1, 50, 98, 195):
        assert_agrees(case, k)


@pytest.mark.gpu
def test_gpu_takes_captions_in_parts(monkeypatch):
    case = gpu_case(196, 24, 39, 1, True, images=4, texts=20)
    monkeypatch.setattr(kernels, "PRODUCT_BYTES", 4 * 4 * 240 * 24 * 3)
    assert_agrees(case, 98)
