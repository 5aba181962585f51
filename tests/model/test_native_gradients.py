"""Gradients of the compiled scoring: against float64, against PyTorch's form, at people's sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lib.batch import Tokens, length_mask
from lib.model import compiled, kernels, native
from lib.model.slimming import AggregationHead
from tests.helpers import encode, pair_inputs, tiny_model
from tests.model.test_fast_paths import laps_at_work, step_peak
from tests.model.test_gradients_at_size import IMAGE_IDS, case, expected, gradients, leaves
from tests.model.test_kernels import plain_matches, random_case

pytestmark = pytest.mark.skipif(not compiled.is_available(), reason="no C compiler here")
LEAVES = ("scores", "logits", "patches", "words", "fixed", "added")


@pytest.fixture(autouse=True)
def served(monkeypatch) -> list[str]:
    """The names of the compiled functions that are called."""
    calls: list[str] = []
    call = compiled.call
    monkeypatch.setattr(compiled, "call", lambda name, jobs: calls.append(name) or call(name, jobs))
    return calls


def without_kernel(monkeypatch) -> None:
    """From now on PyTorch serves."""
    monkeypatch.setattr(kernels, "serves", lambda patches: False)


def assert_near(found: Tensor, wanted: Tensor, share: float, name: str = "") -> None:
    """Assert that the difference has at most that share of the norm; a zero is one to rounding."""
    error = (found.double() - wanted.double()).norm()
    assert error <= share * wanted.double().norm() + 3e-6, f"{name}: {error} of {wanted.norm()}"


# --- one call ------------------------------------------------------------------------------------


def of_random_loss(function, arguments: dict, seed: int = 3, **options) -> dict[str, Tensor]:
    """Gradients of all real matches, weighed at random, by argument."""
    arguments = {
        name: one.detach().clone().requires_grad_() if name in LEAVES and one is not None else one
        for name, one in arguments.items()
    }
    found = function(**arguments, **options)
    counts = options["fused_counts"] or options["k"] < arguments["patches"].shape[1]
    tokens = kernels.token_mask(arguments["fixed_mask"], arguments["logits"].shape[1], counts)
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for one, mask in zip(found, (arguments["word_mask"], tokens), strict=True):
        weights = torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.dtype)
        loss = loss + (one.masked_fill(~mask.expand_as(one), 0) * weights).sum()
    over = {name: arguments[name] for name in LEAVES if arguments.get(name) is not None}
    return gradients(loss, over)


def compare(arguments: dict, share: float = 1e-5, **options) -> None:
    """Assert that the gradients are those of the plain form in float64."""
    arguments = {name: one for name, one in arguments.items() if one is not None}
    wide = {n: one.double() if one.is_floating_point() else one for n, one in arguments.items()}
    wanted = of_random_loss(plain_matches, wide, **options)
    found = of_random_loss(kernels.fused_matches, arguments, **options)
    for name, one in wanted.items():
        assert_near(found[name], one, share, name)


@pytest.mark.parametrize("vectors", ["", "avx2"])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    ("patches", "longest", "tokens", "fixed"),
    [(1, 1, 1, 1), (5, 3, 2, 0), (49, 9, 23, 2), (196, 14, 39, 1), (256, 60, 51, 2)],
)
def test_has_the_plain_forms_gradient(patches, longest, tokens, fixed, added, vectors, monkeypatch):
    monkeypatch.setenv("SEPS_NATIVE", vectors)
    if not compiled.is_available():
        pytest.skip("no such processor")
    arguments = random_case(patches, longest, tokens, fixed, added, images=3, texts=5, width=48)
    for k in sorted({1, (patches + 1) // 2, patches}):
        compare(arguments, k=k, fused_counts=True)
        compare(arguments, k=k, fused_counts=False)


def test_words_may_be_masked_anywhere():
    arguments = random_case(20, 9, 3, 1, True, images=4, texts=6)
    arguments["word_mask"] &= torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    arguments["word_mask"][:, 4] = True
    compare(arguments, k=9, fused_counts=True)


def test_equal_maxima_share_a_gradient():
    arguments = random_case(20, 6, 4, 1, False, images=2, texts=3)
    arguments["words"][:, 1] = arguments["words"][:, 0]
    arguments["logits"][:, 1:3] = arguments["logits"][:, :1]  # three tokens are the same
    arguments["word_mask"][:, 1] = True
    wanted = of_random_loss(plain_matches, arguments, k=9, fused_counts=True)
    found = of_random_loss(kernels.fused_matches, arguments, k=9, fused_counts=True)
    for name in ("words", "logits", "patches"):
        assert_near(found[name], wanted[name], 1e-5, name)


def test_an_image_of_zeros_and_a_zero_token_have_no_gradient_beyond_bounds():
    arguments = random_case(12, 5, 3, 1, False, images=2, texts=3)
    arguments["patches"][0] = 0
    arguments["fixed"][1] = 0
    found = of_random_loss(kernels.fused_matches, arguments, k=6, fused_counts=True)
    assert all(one.isfinite().all() for one in found.values())
    assert (found["patches"][0] == 0).all()
    assert (found["logits"][0] == 0).all()
    assert found["patches"][1].abs().sum() > 0


def test_pairs_without_gradient_are_passed_over_and_change_nothing(served):
    arguments = random_case(30, 7, 5, 1, True, images=4, texts=6)
    read = torch.zeros(4, 6, dtype=torch.bool)
    read[0, 2] = read[2, 1] = read[2, 5] = True  # images 1 and 3 take no part

    def few(function):
        def masked(**given):
            words, tokens = function(**given)
            return words * read[..., None], tokens * read[..., None]

        return masked

    options = {"k": 15, "fused_counts": True}
    wide = {n: one.double() if one.is_floating_point() else one for n, one in arguments.items()}
    wanted = of_random_loss(few(plain_matches), wide, **options)
    found = of_random_loss(few(kernels.fused_matches), arguments, **options)
    assert "match_captions_back" in served
    for name, one in wanted.items():
        assert_near(found[name], one, 1e-5, name)
    assert (found["patches"][[1, 3]] == 0).all()


def test_a_second_run_gives_the_same_bits_and_another_number_of_threads_the_same_gradient():
    arguments = random_case(60, 11, 9, 1, True, images=5, texts=7)
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            runs.append(of_random_loss(kernels.fused_matches, arguments, k=30, fused_counts=True))
    finally:
        torch.set_num_threads(threads)
    for name, one in runs[0].items():
        assert torch.equal(runs[2][name], one)
        assert_near(runs[1][name], one, 1e-6, name)


def test_a_second_derivative_is_refused():
    arguments = random_case(9, 4, 2, 1, False)
    arguments["patches"].requires_grad_()
    found = kernels.fused_matches(**arguments, k=4)[0].sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found, arguments["patches"], create_graph=True)


def test_a_gradient_that_is_not_finite_is_handed_on():
    arguments = random_case(9, 4, 2, 1, False)
    arguments["patches"].requires_grad_()
    loss = kernels.fused_matches(**arguments, k=4)[0].sum() * torch.nan
    assert torch.autograd.grad(loss, arguments["patches"])[0].isnan().all()


# --- the methods ---------------------------------------------------------------------------------

AT_SIZE = [
    ("laps", ()),
    ("laps", (("without_cls", True),)),
    ("ilaps", ()),
    ("seps_released", ()),
    ("seps", ()),
    ("seps", (("dense_match", "max_mean"), ("relevance", "topk_mlp"))),
]


@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
@pytest.mark.parametrize(("method", "flags"), AT_SIZE, ids=str)
def test_losses_have_the_loops_gradient_at_size(method, flags, hardest, served):
    wide, *sides = case(method, flags)
    model = copy.deepcopy(wide).float()
    images, texts = (narrowed(one) for one in sides)
    model.set_hard_negatives(hardest)
    losses = model.losses(images, texts, IMAGE_IDS)
    loss, wanted = expected(method, flags)[hardest]
    torch.testing.assert_close(losses["alignment"].double(), loss, atol=1e-4, rtol=0)
    found = gradients(losses["loss"], leaves(model, images, texts))
    assert "match_captions_back" in served
    for name, one in wanted.items():
        assert_near(found[name], one, 1e-4, name)


def narrowed(tokens: Tokens | None) -> Tokens | None:
    """The same in float32, leaves of their own."""
    if tokens is None:
        return None
    local, head = (
        None if one is None else one.detach().float().requires_grad_()
        for one in (tokens.local, tokens.cls)
    )
    return Tokens(local, tokens.mask, head, narrowed(tokens.dense))


@pytest.mark.parametrize(
    ("method", "flags", "patches", "width"),
    [
        ("laps", {}, 196, 512),
        ("laps", {}, 256, 384),
        ("seps", {}, 196, 512),
        ("seps", {"image_score": "distinct"}, 256, 384),
        ("seps", {"dense_side": "none", "sparse_ratio": 1.0}, 196, 512),
        ("laps", {"sparse_ratio": 0.3, "detach_patches": 1}, 196, 512),
        ("seps", {"detach_patches": 1}, 196, 512),
    ],
    ids=str,
)
def test_all_pairs_have_the_gradient_of_pytorch_at_size(
    method, flags, patches, width, served, monkeypatch
):
    side = round(patches**0.5)
    sizes = {"embed_size": width, "img_res": side * 16, "tiny_patch_size": 16}
    model = tiny_model(method, **{"detach_patches": 0, **sizes, **flags}).train()
    draw_heads(model)
    images = random_rows([patches] * 5, width, 1, cls=True)
    texts = random_rows(torch.randint(3, 30, (64,)).tolist(), width, 2)
    texts.mask[1, 1:] = False  # one word
    if model.dense_owner is not None:
        images.dense = random_rows([31, 8, 50, 17, 29], width, 3)
    over = leaves(model, images, texts)
    weights = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    found = model.similarity(images, texts)
    one = gradients((found * weights).sum(), over)
    assert "match_captions_back" in served
    served.clear()
    without_kernel(monkeypatch)
    wanted = model.similarity(images, texts)
    other = gradients((wanted * weights).sum(), over)
    assert not [name for name in served if name.startswith("match")]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (other["images.local"].abs().sum() > 0) == (not flags.get("detach_patches"))
    for name in over:
        assert_near(one[name], other[name], 1e-4, name)


def draw_heads(model, seed: int = 0) -> None:
    """Draw what lies above the backbones from a seed of its own, with tokens that lie apart.

    How many numbers a backbone draws first differs between versions of transformers. And new
    aggregation heads weigh all patches about alike: their tokens nearly tie for a word, and where
    maxima nearly tie in float32 two forms may choose differently, both rightly.
    """
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if "backbone" not in name and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, AggregationHead):
            torch.nn.init.constant_(module.scale, 5.0)


def random_rows(lengths: list[int], width: int, seed: int, cls: bool = False) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths), width
    local = torch.randn(shape, generator=generator) + torch.randn(width, generator=generator)
    head = torch.randn(len(lengths), 1, width, generator=generator) if cls else None
    mask = length_mask(torch.tensor(lengths), shape[1])
    return Tokens(local.requires_grad_(), mask, head if head is None else head.requires_grad_())


METHODS = [
    ("laps", {}),
    ("laps", {"sparse_ratio": 1.0}),
    ("ilaps", {"use_token_selection": 1, "token_selection_ratio": 0.5}),
    ("seps_released", {"detach_patches": 0}),
    ("seps", {}),
    ("seps", {"relevance": "topk_mlp", "dense_match": "mean"}),
]


def training_gradients(method: str, flags: dict, hardest: bool, **settings) -> dict[str, Tensor]:
    """Gradients of the loss at the tiny model's parameters."""
    model = tiny_model(method, **flags).train()
    for name, value in settings.items():
        setattr(model, name, value)
    model.set_hard_negatives(hardest)
    model.training_losses(**pair_inputs(6, method, **flags))["loss"].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunks", ["one", "again", "two passes"])
@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
@pytest.mark.parametrize(("method", "flags"), METHODS, ids=str)
def test_training_has_the_gradient_of_pytorch(method, flags, hardest, chunks, served, monkeypatch):
    """In one call, in chunks scored again, and with the few pairs of hardest negatives alone."""
    if chunks != "one":
        monkeypatch.setattr(kernels, "PAIRS_WITH_GRADIENT", 4)
    if chunks == "two passes":
        monkeypatch.setattr("lib.methods.pairs.PAIRS_AT_ONCE", 5)
    size = {"shard_size": 64 if chunks == "one" else 2}
    found = training_gradients(method, flags, hardest, **size)
    assert "match_captions_back" in served
    without_kernel(monkeypatch)
    wanted = training_gradients(method, flags, hardest)
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, atol=1e-5, rtol=1e-4, msg=name)


def test_less_is_kept_than_by_pytorch(monkeypatch):
    model, images, texts, ids = laps_at_work()
    model.shard_size = 80  # all pairs at once either way
    ours = step_peak(lambda: model.losses(images, texts, ids)["loss"])
    without_kernel(monkeypatch)
    assert ours < step_peak(lambda: model.losses(images, texts, ids)["loss"]) / 2


@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
@pytest.mark.parametrize("method", ["laps", "seps"])
def test_where_the_kernel_steps_back_pytorch_has_the_whole_gradient(
    method, hardest, served, monkeypatch
):
    """The norms' part too: the Gram matrix was made for the kernel."""
    sizes = {"embed_size": 64, "img_res": 80}  # few words, many patches: the Gram form
    monkeypatch.setattr("lib.model.gram.gram_pays", lambda *sizes: True)
    monkeypatch.setattr(native, "matches", lambda *arguments: None)
    found = training_gradients(method, sizes, hardest)
    assert "match_captions_back" not in served
    without_kernel(monkeypatch)
    wanted = training_gradients(method, sizes, hardest)
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reason", ["mixed", "float64", "gumbel", "control", "caption's dense"])
def test_what_it_does_not_know_is_left_to_pytorch(reason, served):
    flags = {"gumbel": {"selection": "gumbel"}, "caption's dense": {"dense_side": "caption"}}
    model = tiny_model("seps", **flags.get(reason, {})).train()
    if reason == "control":
        model.patch_selection.set_control("random")
    if reason == "float64":
        model = model.double()
    inputs = pair_inputs(4, "seps", **flags.get(reason, {}))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reason == "mixed"):
        images, texts = encode(model, inputs)
        served.clear()
        loss = model.losses(images, texts, inputs["image_ids"])["loss"]
    loss.backward()
    assert not [name for name in served if name.startswith("match")]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
