"""Selection, soft selection and aggregation, and the alignment functions, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from lib.model.alignment import (
    Relevance,
    best_affinities,
    best_matches,
    largest,
    masked_average,
    mean_of_best,
)
from lib.model.slimming import (
    Aggregation,
    PatchScore,
    aggregated_count,
    dropped_sum,
    global_scores,
    kept_count,
    masked_mean,
    min_max,
    peak_weights,
    selected_softmax,
    selected_sums,
    text_scores,
    top_k_mask,
)
from tests.helpers import tiny_model
from tools.benchmark.cases import Case

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(SCORES, st.integers(1, 12))
@settings(deadline=None, max_examples=80)
def test_top_k_keeps_k_and_of_ties_the_first(values, k):
    scores = torch.tensor(values, dtype=torch.float32)
    found = top_k_mask(scores, k).nonzero().flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert found == sorted(order[:k])


@given(SCORES)
@settings(deadline=None, max_examples=40)
def test_min_max_stays_in_the_unit_interval(values):
    found = min_max(torch.tensor(values, dtype=torch.float32))
    assert found.min() == 0
    assert found.max() == (1 if len(set(values)) > 1 else 0)


def test_counts_of_the_papers_settings():
    assert (kept_count(196, 0.5), aggregated_count(196, 0.5, 0.4)) == (98, 39)
    assert (kept_count(49, 0.8), aggregated_count(49, 0.8, 0.6)) == (40, 23)
    assert (kept_count(4, 0.01), aggregated_count(4, 0.1, 0.1)) == (1, 1)
    assert kept_count(7, 1.0) == 7


@pytest.mark.parametrize("soft", [False, True])
def test_selected_softmax_is_the_softmax_of_the_kept(soft):
    logits = torch.randn(5, 9, dtype=torch.float64) * 20
    decision = torch.rand(5, 9) < 0.5
    decision[:, 3] = True
    given_as = decision.double() if soft else decision
    found = selected_softmax(logits, given_as)
    for row in range(5):
        kept = decision[row]
        torch.testing.assert_close(found[row][kept], logits[row][kept].softmax(0))
        assert (found[row][~kept] == 0).all()


@pytest.mark.parametrize("soft", [False, True])
def test_a_row_that_keeps_nothing_gives_zeros_and_finite_gradients(soft):
    logits = torch.randn(2, 4, requires_grad=True)
    decision = torch.zeros(2, 4) if soft else torch.zeros(2, 4, dtype=torch.bool)
    found = selected_softmax(logits, decision)
    found.sum().backward()
    assert (found == 0).all()
    assert torch.isfinite(logits.grad).all()


def test_sums_of_kept_and_dropped_patches_equal_loops():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    scores = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    decision = top_k_mask(scores, 3)
    local = selected_sums(Aggregation(logits, peak_weights(logits)), decision)
    tokens = local.scaled(local.weights @ patches[:, None])
    fused = (dropped_sum(scores, decision).weights @ patches[:, None])[:, :, 0]
    for v in range(2):
        for t in range(5):
            kept = decision[v, t]
            for n in range(3):
                expected = logits[v, n][kept].softmax(0) @ patches[v][kept]
                torch.testing.assert_close(tokens[v, t, n], expected)
            expected = scores[v, t][~kept].softmax(0) @ patches[v][~kept]
            torch.testing.assert_close(fused[v, t], expected)


def test_scores_stay_in_float32_under_autocast():
    patches, text = torch.randn(2, 9, 16), torch.randn(3, 16)
    plain = global_scores(patches, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = global_scores(patches, text)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_mean_of_best_equals_the_loop():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 3, 5, 4, generator=generator)
    words = torch.randn(3, 6, 4, generator=generator)
    word_mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] + [0] * 5]).bool()
    token_mask = torch.ones(2, 3, 5, dtype=torch.bool)
    token_mask[1, 2, 3:] = False
    normal = tokens / tokens.norm(dim=-1, keepdim=True)
    cosines = torch.einsum("vtnc,tmc->vtnm", normal, words)
    best = best_affinities(cosines, token_mask, word_mask)
    found = mean_of_best(*best, token_mask, word_mask)
    for v in range(2):
        for t in range(3):
            real = tokens[v, t][token_mask[v, t]]
            a = real / real.norm(dim=1, keepdim=True) @ words[t][word_mask[t]].T
            a = torch.where(a > 0, a, 0.1 * a)
            expected = a.max(0).values.mean() + a.max(1).values.mean()
            torch.testing.assert_close(found[v, t], expected)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_relevance_never_counts_more_than_the_valid_entries(values, k):
    row = torch.tensor([*values, 9.0])  # the last entry is padding and the largest
    mask = torch.tensor([True] * len(values) + [False])
    expected = sum(sorted(values, reverse=True)[:k]) / min(k, len(values))
    assert float(Relevance("topk_mean", k)(row, mask)) == pytest.approx(expected, abs=1e-5)
    top, real = largest(row, mask, k)
    assert int(real.sum()) == min(k, len(values))
    assert top.shape == (k,)


def test_masked_average_and_best_matches_ignore_padding():
    affinity = torch.tensor([[[[0.2, 9.0], [0.4, 9.0]]]])  # one pair, two tokens, two words
    mask = torch.tensor([[True, False]])
    for_words, for_tokens = best_matches(affinity, torch.ones(1, 1, 2, dtype=torch.bool), mask)
    assert float(masked_average(for_words, mask)) == pytest.approx(0.4)
    assert for_tokens.flatten().tolist() == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("half_inputs", [False, True])
def test_predicted_scores_are_full_precision_under_autocast(half_inputs):
    torch.manual_seed(0)
    score, patches = PatchScore(64), torch.randn(2, 9, 64)
    if half_inputs:
        patches = patches.bfloat16()
    wanted = score.mlp(patches.float()).squeeze(-1).sigmoid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = score(patches)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_global_embeddings_are_not_half_precision_means(dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(3, 300, 16, generator=generator) + 0.3).to(dtype)
    mask = torch.arange(300) < torch.tensor([[300], [257], [1]])
    found = masked_mean(tokens, mask)
    assert found.dtype == torch.float32
    for row, real in enumerate(mask):
        wanted = tokens[row][real].double().mean(0).float()
        torch.testing.assert_close(found[row], wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["laps", "seps", "seps_released", "ilaps"])
def test_half_precision_inputs_keep_the_patches_of_their_values(method):
    """Tokens as an encoder under autocast hands them out choose what the same numbers choose."""
    case = Case(method if method != "ilaps" else "laps", "eval", 196, None, 6, 12)
    model = case.model()
    if method == "ilaps":
        model = tiny_model("ilaps", img_res=224, tiny_patch_size=16, embed_size=512).eval()
    images, texts = case.image_tokens(), case.text_tokens()
    half, wide = ([side._map(change) for side in (images, texts)] for change in (_half, _wide))
    with torch.no_grad():
        wanted = model.patch_choice(*wide).kept["sparse"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.patch_choice(*half).kept["sparse"]
    changed = (found != wanted).any(-1).float().mean()
    assert float(changed) <= 0.02  # ties of rounding


def _half(tensor):
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _wide(tensor):
    return _half(tensor).float() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("own", [True, False])
def test_scores_by_compiled_products_are_the_same(own):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 196, 512, generator=generator)
    patches[1, 5] = 0  # has no direction
    texts = torch.randn(3, 4, 512, generator=generator) if own else torch.randn(4, 512)
    gram = patches @ patches.transpose(1, 2)
    found = text_scores(patches, texts, gram)
    assert found.shape == (3, 4, 196)
    torch.testing.assert_close(found, text_scores(patches, texts), atol=1e-6, rtol=0)
    one = cosine_similarity(patches[2, 9], texts[2, 1] if own else texts[1], dim=0)
    torch.testing.assert_close(found[2, 1, 9], one, atol=1e-6, rtol=0)
