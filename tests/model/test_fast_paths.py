"""Every fast path against the plain form: same numbers, same gradients, far less kept in memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.batch import FEWEST_IN_BUCKET, Tokens, length_buckets
from lib.methods.registry import get_method, method_names
from lib.model import gram, kernels
from lib.model.gram import PairTokens, PatchSums, gram_matrix, gram_pays, unit
from lib.model.losses import hardest_pairs, hinge_triplet, negatives_mask
from lib.model.slimming import (
    LARGEST_EXPONENT,
    Aggregation,
    LapsNetwork,
    min_max,
    peak_weights,
    selected_sums,
    top_k_mask,
)
from lib.retrieval.similarity import similarity_matrix
from tests.helpers import encode, pair_inputs, random_tokens, tiny_model
from tools.benchmark.loop import laps_loop

SHAPES = st.tuples(
    st.integers(1, 3),  # images
    st.integers(1, 4),  # captions
    st.integers(1, 5),  # tokens
    st.integers(1, 7),  # patches
    st.integers(1, 4),  # words
    st.integers(0, 2),  # fixed tokens
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pair_tokens(shape, seed: int, dtype=torch.float64, zero: bool = False):
    """Leaves and the two sums of a random case; with `zero`, an image of zero vectors."""
    images, captions, tokens, patches, words, fixed = shape
    leaves = {
        "patches": random(images, patches, 6, seed=seed),
        "words": random(captions, words, 6, seed=seed + 1),
        "weights": random(images, captions, tokens, patches, seed=seed + 2).exp(),
        "fused": random(images, captions, 1, patches, seed=seed + 3).abs(),
        "fixed": random(images, fixed, 6, seed=seed + 4),
    }
    if zero:
        leaves["patches"][0] = 0
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}


def products(leaves, with_gram: bool) -> torch.Tensor:
    patches = leaves["patches"]
    sums = [PatchSums(leaves["weights"], leaves["weights"].sum(-1)), PatchSums(leaves["fused"])]
    matrix = patches @ patches.transpose(1, 2) if with_gram else None
    return PairTokens(patches, sums, unit(leaves["fixed"]), matrix).products(unit(leaves["words"]))


@given(SHAPES, st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_gram_form_equals_direct_form_and_its_gradient(shape, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "gram_pays", lambda *sizes: True)
        leaves = pair_tokens(shape, seed)
        direct, fast = products(leaves, False), products(leaves, True)
        torch.testing.assert_close(fast, direct, atol=1e-12, rtol=0)
        outer = random(*direct.shape, seed=seed)
        expected = torch.autograd.grad((direct * outer).sum(), list(leaves.values()))
        found = torch.autograd.grad((fast * outer).sum(), list(leaves.values()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def test_gram_form_in_float32_and_with_zero_vectors(monkeypatch):
    monkeypatch.setattr(gram, "gram_pays", lambda *sizes: True)
    leaves = pair_tokens((2, 3, 5, 9, 4, 1), 0, torch.float32, zero=True)
    direct, fast = products(leaves, False), products(leaves, True)
    torch.testing.assert_close(fast, direct, atol=1e-5, rtol=0)
    assert (fast[0, :, :-1] == 0).all()
    assert torch.isfinite(torch.autograd.grad(fast.sum(), leaves["words"])[0]).all()


def test_the_cheaper_form_follows_the_number_of_words():
    assert gram_pays(39, 196, 512, 12)  # a caption before ViT-224
    assert not gram_pays(39, 196, 512, 105)  # a dense text
    patches = torch.randn(1, 36, 64)
    assert gram_matrix(patches, 30).shape == (1, 36, 36)
    assert gram_matrix(patches, 2) is None  # two tokens are sooner added up
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gram_matrix(patches, 30) is None


@pytest.mark.parametrize("spread", [1.0, LARGEST_EXPONENT])
def test_weights_of_the_whole_image_give_the_softmax_of_the_kept(spread):
    logits = spread * 1.01 * min_max(random(2, 3, 8))
    decision = top_k_mask(random(2, 5, 8, seed=1), 3)
    peaks = peak_weights(logits)
    assert (peaks is None) == (spread == LARGEST_EXPONENT)
    sums = selected_sums(Aggregation(logits, peaks), decision)
    weights = sums.weights if sums.mass is None else sums.weights / sums.mass[..., None]
    expected = logits[:, None].masked_fill(~decision[:, :, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_length_buckets_lose_nothing_and_pad_little(lengths, most):
    buckets = length_buckets(lengths, most)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        sizes = [lengths[index] for index in bucket]
        assert 1 <= len(bucket) <= most
        assert sizes == sorted(sizes)
        if len(bucket) > FEWEST_IN_BUCKET:
            assert sizes[-1] <= max(1.125 * sizes[0], sizes[FEWEST_IN_BUCKET - 1])


def test_captions_of_one_length_stay_in_order():
    assert length_buckets([7] * 5, 9) == [[0, 1, 2, 3, 4]]
    assert length_buckets([7] * 5, 3) == [[0, 1, 2], [3, 4]]


# --- hardest negatives: all pairs without a graph, few with one ---------------------------------


def double_case(method: str, pairs: int = 6, **flags):
    torch.manual_seed(0)
    model = tiny_model(method, detach_patches=0, **flags).double().train()
    model.set_hard_negatives(True)
    model.criterion.margin = 0.6
    for name, parameter in model.named_parameters():
        if "dropout" not in name:
            parameter.data.normal_(0, 0.3)
    inputs = pair_inputs(pairs, method, **flags)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, inputs


def loss_and_gradients(model, inputs, once: bool, monkeypatch):
    chosen = []

    def counted(*args):
        chosen.append(len(args[2]))
        return type(model).pair_scores(model, *args)

    with monkeypatch.context() as patch:
        if once:
            patch.setattr(type(model), "scores_repeat", False)
        patch.setattr(model, "pair_scores", counted, raising=False)
        model.zero_grad()
        torch.manual_seed(0)
        loss = model.training_losses(**inputs)["loss"]
        loss.backward()
    assert bool(chosen) != once  # or a path would be compared with itself
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: grad.clone() for name, grad in found.items()}


def assert_two_passes_change_nothing(model, inputs, monkeypatch):
    plain, expected = loss_and_gradients(model, inputs, True, monkeypatch)
    fast, found = loss_and_gradients(model, inputs, False, monkeypatch)
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    assert found.keys() == expected.keys()
    assert any(grad.abs().sum() > 0 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-9, rtol=1e-7, msg=name)


# pooled methods score too cheaply for it, and the loss of avse reads pooled embeddings
TWICE_SCORED = [name for name in method_names() if get_method(name).scores_repeat is not False]
TWICE_SCORED.remove("avse")


@pytest.mark.parametrize("method", TWICE_SCORED)
def test_two_passes_give_the_hardest_negatives_gradient(method, monkeypatch):
    model, inputs = double_case(method)
    assert_two_passes_change_nothing(model, inputs, monkeypatch)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("laps", {}),
        ("ilaps", {}),
        ("seps_released", {}),
        ("seps", {}),
        ("seps", {"dense_side": "none"}),
    ],
    ids=str,
)
def test_two_passes_without_a_cls_token(method, flags, monkeypatch):
    """As with Swin, whose images have none."""
    model, inputs = double_case(method, **flags)
    encode_images = model.encode_images

    def without_cls(*args, **kwargs):
        tokens = encode_images(*args, **kwargs)
        tokens.cls = None
        return tokens

    monkeypatch.setattr(model, "encode_images", without_cls, raising=False)
    assert_two_passes_change_nothing(model, inputs, monkeypatch)


@pytest.mark.parametrize(
    "flags",
    [
        {"relevance": "topk_mlp"},
        {"dense_side": "caption"},
        {"dense_side": "none", "sparse_ratio": 1.0},
        {"dense_match": "max_mean"},
        {"sparse_ratio": 0.01},
    ],
    ids=str,
)
def test_two_passes_with_the_options_of_seps(flags, monkeypatch):
    model, inputs = double_case("seps", **flags)
    assert_two_passes_change_nothing(model, inputs, monkeypatch)


def test_noise_is_never_scored_twice():
    model, _ = double_case("seps", selection="gumbel")
    assert not model.scores_repeat
    assert model.eval().scores_repeat


def test_pairs_that_are_all_alike_are_scored_once(monkeypatch):
    model, inputs = double_case("laps")
    for key in ("ids", "lengths"):
        inputs[key][:] = inputs[key][0]
    inputs["pixels"][:] = inputs["pixels"][0]
    monkeypatch.setattr(type(model), "pair_scores", None, raising=False)
    loss = model.training_losses(**inputs)["loss"]
    assert 0 < loss < torch.inf


def test_two_passes_with_equal_hardest_negatives(monkeypatch):
    model, inputs = double_case("laps")
    for key in ("ids", "lengths"):
        inputs[key][2] = inputs[key][1]  # two captions alike: every image finds them equally hard
    assert_two_passes_change_nothing(model, inputs, monkeypatch)


def test_two_passes_with_more_pairs_than_are_scored_at_once(monkeypatch):
    monkeypatch.setattr("lib.methods.pairs.PAIRS_AT_ONCE", 4)
    model, inputs = double_case("laps")
    assert_two_passes_change_nothing(model, inputs, monkeypatch)


@pytest.mark.parametrize("method", ["laps", "ilaps", "seps", "seps_released"])
def test_two_passes_train_every_parameter_in_mixed_precision(method):
    flags = {"similarity_calc_method": "attn"} if method == "ilaps" else {}
    if method == "seps":
        flags = {"relevance": "topk_mlp"}
    model = tiny_model(method, detach_patches=0, **flags).train()
    model.set_hard_negatives(True)
    model.criterion.margin = 2.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_losses(**pair_inputs(6, method, **flags))["loss"]
    loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert silent == set()


@given(st.integers(2, 6), st.integers(0, 50), st.booleans())
@settings(deadline=None, max_examples=60)
def test_pairs_read_are_where_the_hinge_loss_has_gradient(size, seed, ties):
    similarity = random(size, size, seed=seed)
    if ties:
        similarity = similarity.round()
    similarity.requires_grad_()
    negatives = negatives_mask(torch.arange(size) // 2)
    hinge_triplet(similarity, negatives, 0.3, hardest=True).backward()
    read = hardest_pairs(similarity.detach(), negatives, 0.3)
    assert not ((similarity.grad != 0) & ~read).any()
    if not ties:
        assert read.sum() <= 3 * size


# --- what is computed and kept ------------------------------------------------------------------


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def step_peak(similarity_loss) -> int:
    """Peak bytes of what forward and backward of one call make: no timer, no allocator."""
    with LiveTensors() as counter:
        similarity_loss().backward()
    return counter.peak


def laps_at_work():
    model = tiny_model("laps", detach_patches=0, shard_size=16).train()
    images = random_tokens(80, 36, 32, seed=0, cls=True)
    texts = random_tokens(80, 9, 32, seed=1, ragged=True)

    def narrow(tokens: Tokens) -> Tokens:
        return tokens._map(lambda one: one.float() if one.is_floating_point() else one)

    model.network = LapsNetwork(32, 36, 0.5, 0.4)
    return model, narrow(images), narrow(texts), torch.arange(80)


@pytest.mark.parametrize(("hard", "share"), [(True, 1 / 8), (False, 1 / 4)])
def test_peak_of_a_step_is_a_fraction_of_the_loops(hard, share):
    model, images, texts, ids = laps_at_work()
    model.set_hard_negatives(hard)
    ours = step_peak(lambda: model.losses(images, texts, ids)["loss"])
    loop = step_peak(lambda: model.criterion(laps_loop(model, images, texts), ids))
    assert ours < share * loop


def test_chunks_take_less_than_all_pairs(monkeypatch):
    monkeypatch.setattr(kernels, "serves", lambda patches: False)
    model, images, texts, ids = laps_at_work()
    model.shard_size = 80
    whole = step_peak(lambda: model.losses(images, texts, ids)["loss"])
    model.shard_size = 16
    assert step_peak(lambda: model.losses(images, texts, ids)["loss"]) < whole / 4


@pytest.mark.parametrize("method", ["laps", "seps", "seps_released", "ilaps"])
def test_evaluation_prepares_each_image_once(method, monkeypatch):
    monkeypatch.setattr("lib.retrieval.similarity.TEXTS_AT_ONCE", 2)
    model = tiny_model(method).eval()
    images, texts = encode(model, pair_inputs(6, method))
    seen = []
    head = model.sparse_head if method == "seps" else model.network.head
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    parts = [texts[first : first + 2] for first in range(0, 6, 2)]
    with torch.inference_mode():
        whole = model.similarity(images, texts)
        seen.clear()
        halves = [images[:4], images[4:]]
        found = similarity_matrix(model, halves, parts, torch.inference_mode, len(images))
    assert sum(seen) == 6
    torch.testing.assert_close(torch.from_numpy(found), whole, atol=1e-5, rtol=0)


def test_trimmed_tokens_keep_every_real_word():
    tokens = Tokens(torch.arange(12.0).view(2, 3, 2), torch.tensor([[True, False, False]] * 2))
    assert tokens.trimmed().local.shape == (2, 1, 2)
    assert tokens.trimmed().trimmed().local.tolist() == [[[0.0, 1.0]], [[6.0, 7.0]]]
