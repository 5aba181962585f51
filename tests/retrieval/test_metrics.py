"""Ranks, recall, folds, intervals and the table, against hand-worked matrices and a naive loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.retrieval import metrics
from lib.retrieval.bootstrap import rank_intervals
from lib.retrieval.metrics import fold_metrics, query_ranks, ranks, recall_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "recall_metrics.npz"

# Two captions an image. I2T: image 0 is beaten by caption 2 (0.9); image 1 wins with caption 3;
# image 2's best (0.4) is beaten by captions 0 and 1. T2I: caption 4 is beaten by images 0 and 1.
HAND = np.array(
    [
        [0.8, 0.1, 0.9, 0.2, 0.3, 0.0],
        [0.2, 0.5, 0.3, 0.7, 0.4, 0.1],
        [0.5, 0.6, 0.1, 0.3, 0.2, 0.4],
    ]
)


def naive_ranks(similarity, owners):
    """The definition of SPEC 8, one query and one candidate at a time."""
    i2t, t2i, ties = [], [], 0
    for image, row in enumerate(similarity):
        best = max(score for score, owner in zip(row, owners, strict=True) if owner == image)
        wrong = [score for score, owner in zip(row, owners, strict=True) if owner != image]
        i2t.append(1 + sum(score >= best for score in wrong))
        ties += best in wrong
    for caption, owner in enumerate(owners):
        column = list(similarity[:, caption])
        right = column.pop(owner)
        t2i.append(1 + sum(score >= right for score in column))
        ties += right in column
    return i2t, t2i, ties


@st.composite
def galleries(draw):
    """A small matrix full of ties, with captions in any order and unequal numbers per image."""
    n_images = draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(0, n_images - 1), max_size=10))
    owners = draw(st.permutations(list(range(n_images)) + extra))
    values = st.lists(st.integers(-3, 3), min_size=len(owners), max_size=len(owners))
    rows = draw(st.lists(values, min_size=n_images, max_size=n_images))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64, np.int64]))
    return np.array(rows, dtype=dtype), np.array(owners)


def noisy_gallery(n_images, k=5, signal=1.5, seed=0):
    """Random scores in which the right pairs stand out a little."""
    rng = np.random.default_rng(seed)
    similarity = rng.standard_normal((n_images, n_images * k)).astype(np.float32)
    captions = np.arange(n_images * k)
    similarity[captions // k, captions] += signal
    return similarity


def test_hand_worked_ranks():
    i2t, t2i, ties = ranks(HAND, [0, 0, 1, 1, 2, 2])
    assert i2t.tolist() == [2, 1, 3]
    assert t2i.tolist() == [1, 3, 2, 1, 3, 1]
    assert ties == 0


def test_hand_worked_metrics():
    result = recall_metrics(HAND, captions_per_image=2)
    i2t = {"r1": 100 / 3, "r5": 100.0, "r10": 100.0, "medr": 2.0, "meanr": 2.0}
    t2i = {"r1": 50.0, "r5": 100.0, "r10": 100.0, "medr": 1.5, "meanr": 11 / 6}
    assert result["i2t"] == pytest.approx(i2t)
    assert result["t2i"] == pytest.approx(t2i)
    assert result["rsum"] == pytest.approx(450 + 100 / 3)
    assert result["ties"] == 0
    assert list(result) == ["i2t", "t2i", "rsum", "ties"]


@pytest.mark.parametrize(
    ("rank", "recalled"),
    [
        (1, (1, 1, 1)),
        (2, (0, 1, 1)),
        (5, (0, 1, 1)),
        (6, (0, 0, 1)),
        (10, (0, 0, 1)),
        (11, (0, 0, 0)),
    ],
)
def test_recall_counts_rank_k_itself(rank, recalled):
    """Image 0 finds its caption at exactly `rank`; every other query is right."""
    n_images = 20
    similarity = 2.0 * np.eye(n_images)
    similarity[0, 1:rank] = 3.0
    similarity[range(1, n_images), range(1, n_images)] = 4.0
    i2t = recall_metrics(similarity, captions_per_image=1)["i2t"]
    others = 100 * (n_images - 1) / n_images
    expected = [others + 100 / n_images * hit for hit in recalled]
    assert [i2t["r1"], i2t["r5"], i2t["r10"]] == pytest.approx(expected)


def test_official_recording():
    with np.load(GOLDEN) as golden:
        result = recall_metrics(golden["similarity"])
        for direction in ("i2t", "t2i"):
            values = [result[direction][key] for key in ("r1", "r5", "r10", "medr", "meanr")]
            np.testing.assert_allclose(values, golden[direction], rtol=0, atol=1e-10)
        expected_rsum = golden["i2t"][:3].sum() + golden["t2i"][:3].sum()
    assert result["rsum"] == pytest.approx(expected_rsum)
    assert result["ties"] == 0


def test_ties_count_against_and_are_counted():
    # Image 0 ties with caption 1, and caption 1 therefore with image 0; the rest is clear.
    similarity = np.array([[0.5, 0.5], [0.1, 0.5]])
    i2t, t2i, ties = ranks(similarity, [0, 1])
    assert i2t.tolist() == [2, 1]
    assert t2i.tolist() == [1, 2]
    assert ties == 2


def test_equal_right_captions_are_no_tie():
    similarity = np.array([[0.5, 0.5, 0.1, 0.2], [0.0, 0.1, 0.7, 0.7]])
    i2t, _, ties = ranks(similarity, [0, 0, 1, 1])
    assert i2t.tolist() == [1, 1]
    assert ties == 0


def test_all_equal_matrix_gives_the_worst_ranks():
    i2t, t2i, ties = ranks(np.zeros((4, 20)), np.arange(20) // 5)
    assert i2t.tolist() == [16] * 4
    assert t2i.tolist() == [4] * 20
    assert ties == 24
    assert recall_metrics(np.zeros((30, 150)))["rsum"] == 0


@given(galleries(), st.integers(1, 30))
def test_ranks_match_a_naive_loop_at_any_chunk_size(gallery, chunk_values):
    similarity, owners = gallery
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK_VALUES", chunk_values)
        i2t, t2i, ties = ranks(similarity, owners)
    assert (i2t.tolist(), t2i.tolist(), ties) == naive_ranks(similarity, owners)


@given(galleries(), st.randoms(use_true_random=False))
def test_order_never_matters(gallery, random):
    similarity, owners = gallery
    n_images, n_captions = similarity.shape
    rows = random.sample(range(n_images), n_images)
    columns = random.sample(range(n_captions), n_captions)
    i2t, t2i, ties = ranks(similarity, owners)
    shuffled = ranks(similarity[rows][:, columns], np.argsort(rows)[owners[columns]])
    assert shuffled[0].tolist() == i2t[rows].tolist()
    assert shuffled[1].tolist() == t2i[columns].tolist()
    assert shuffled[2] == ties


def test_unequal_captions_per_image():
    similarity = np.array([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.7, 0.4]])
    owners = [0, 0, 1, 0]  # image 0 owns captions 0, 1 and 3; image 1 owns caption 2
    result = recall_metrics(similarity, caption_images=owners)
    assert result["i2t"]["r1"] == 50.0  # image 1 prefers caption 0
    assert result["t2i"]["r1"] == 50.0  # captions 0 and 3 prefer image 1
    assert result["t2i"]["meanr"] == 1.5


def test_caption_images_say_the_same_as_captions_per_image():
    similarity = noisy_gallery(12, k=3)
    by_owner = recall_metrics(similarity, caption_images=np.repeat(np.arange(12), 3))
    assert by_owner == recall_metrics(similarity, captions_per_image=3)


def test_accepts_a_tensor():
    assert recall_metrics(torch.from_numpy(HAND), 2) == recall_metrics(HAND, 2)


@pytest.mark.parametrize("call", [recall_metrics, fold_metrics, query_ranks])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error(call, value, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 60)  # two rows a chunk: found in the second
    similarity = noisy_gallery(5)
    similarity[3, 0] = value  # outside the folds' blocks, an error all the same
    similarity[3, 7] = value
    similarity[4, 2] = value
    message = rf"3 values that are NaN or infinite, the first is {value} at image 3, caption 0;"
    with pytest.raises(ValueError, match=message):
        call(similarity)


@pytest.mark.parametrize(
    ("similarity", "options", "message"),
    [
        (np.zeros((3, 14)), {}, "14 captions, but 3 images with 5 captions each make 15"),
        (np.zeros((3, 6)), {"captions_per_image": 0}, "whole number from 1, not 0"),
        (np.zeros((3, 6)), {"captions_per_image": 2.0}, "whole number from 1, not 2.0"),
        (np.zeros(6), {}, r"matrix, not \(6,\)"),
        (np.zeros((0, 0)), {}, r"matrix, not \(0, 0\)"),
        (np.zeros((2, 3)), {"caption_images": [0, 1]}, r"3 whole numbers.* of shape \(2,\)"),
        (np.zeros((2, 2)), {"caption_images": [0.0, 1.0]}, "2 whole numbers.*float64"),
        (np.zeros((2, 3)), {"caption_images": [0, 1, 2]}, "in 0 to 1, .* not in 0 to 2"),
        (np.zeros((2, 3)), {"caption_images": [0, 1, -1]}, "in 0 to 1, .* not in -1 to 1"),
        (np.zeros((4, 3)), {"caption_images": [0, 2, 2]}, "2 of 4 images .* first is image 1;"),
    ],
)
def test_what_does_not_fit_is_an_error(similarity, options, message):
    with pytest.raises(ValueError, match=message):
        recall_metrics(similarity, **options)


def test_folds_are_consecutive_parts_averaged():
    similarity = noisy_gallery(20, k=2)
    result = fold_metrics(similarity, folds=4, captions_per_image=2)
    parts = [
        recall_metrics(similarity[5 * f : 5 * f + 5, 10 * f : 10 * f + 10], 2) for f in range(4)
    ]
    for direction in ("i2t", "t2i"):
        for name, value in result[direction].items():
            assert value == pytest.approx(np.mean([part[direction][name] for part in parts]))
    assert result["rsum"] == pytest.approx(np.mean([part["rsum"] for part in parts]))
    assert result["rsum"] > recall_metrics(similarity, 2)["rsum"]  # smaller galleries are easier


def test_folds_add_their_ties():
    assert fold_metrics(np.zeros((6, 12)), folds=3, captions_per_image=2)["ties"] == 6 + 12


def test_folds_take_scattered_captions():
    similarity = noisy_gallery(10)
    order = np.random.default_rng(1).permutation(50)
    scattered = fold_metrics(similarity[:, order], caption_images=order // 5)
    assert scattered == fold_metrics(similarity)


def test_one_fold_is_the_whole_gallery():
    similarity = noisy_gallery(10)
    assert fold_metrics(similarity, folds=1) == recall_metrics(similarity)


@pytest.mark.parametrize("folds", [0, 3])
def test_unequal_folds_are_an_error(folds):
    with pytest.raises(ValueError, match=f"10 images do not divide into {folds} equal folds"):
        fold_metrics(noisy_gallery(10), folds=folds)


def flat_recalls(result):
    named = {f"{way}_r{k}": result[way][f"r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)}
    return {**named, "rsum": result["rsum"]}


@pytest.mark.parametrize("folds", [1, 4])
def test_intervals_contain_the_point(folds):
    similarity = noisy_gallery(100)
    points = flat_recalls(fold_metrics(similarity, folds))
    intervals = rank_intervals(query_ranks(similarity, folds=folds))
    assert list(intervals) == list(points)
    for name, (low, high) in intervals.items():
        assert low <= points[name] <= high, name
        assert low < high, name


def test_interval_width_matches_the_binomial():
    """One caption an image, half of the images found: 95% is 1.96·sqrt(p(1-p)/n) each side."""
    n_images = 400
    similarity = np.eye(n_images)
    similarity[: n_images // 2, 0] = 2.0  # caption 0 wins the first half, its own image included
    found = recall_metrics(similarity, 1)["i2t"]["r1"] / 100
    half = 100 * 1.96 * np.sqrt(found * (1 - found) / n_images)
    low, high = rank_intervals(query_ranks(similarity, 1))["i2t_r1"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_intervals_keep_captions_with_their_image():
    """Captions of an image that fail together are one draw, not five: the interval is as wide."""
    n_images = 100
    single = np.eye(n_images)
    single[1, : n_images // 2] = 2.0  # image 1 takes the captions of the first half
    alone = rank_intervals(query_ranks(single, 1))["t2i_r1"]
    together = rank_intervals(query_ranks(np.repeat(single, 5, axis=1), 5))["t2i_r1"]
    assert together == pytest.approx(alone)


def test_intervals_shrink_with_more_queries():
    widths = []
    for n_images in (25, 100, 400):  # the same gallery again and again, in blocks out of reach
        copies = n_images // 25
        blocks = np.kron(np.eye(copies), noisy_gallery(25) + 100)
        low, high = rank_intervals(query_ranks(blocks))["rsum"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.15)
    assert widths[2] == pytest.approx(widths[0] / 4, rel=0.15)


def test_intervals_follow_seed_and_level():
    found = query_ranks(noisy_gallery(40))
    first = rank_intervals(found, repeats=200, seed=3)
    assert first == rank_intervals(found, repeats=200, seed=3)
    assert first != rank_intervals(found, repeats=200, seed=4)
    narrow = rank_intervals(found, repeats=200, seed=3, level=0.5)
    for name in first:
        assert first[name][0] <= narrow[name][0] <= narrow[name][1] <= first[name][1]


@pytest.mark.parametrize("options", [{"repeats": 0}, {"level": 0.0}, {"level": 1.0}])
def test_intervals_reject_what_makes_no_sense(options):
    with pytest.raises(ValueError, match="repeats >= 1 and 0 < level < 1"):
        rank_intervals(query_ranks(noisy_gallery(4)), **options)


# --- further K, properties, other implementations -----------------------------------------------


def test_recalls_at_other_depths_leave_rsum_alone():
    plain = recall_metrics(noisy_gallery(60))
    further = recall_metrics(noisy_gallery(60), recall_at=(50, 3))
    assert list(further["i2t"]) == ["r1", "r3", "r5", "r10", "r50", "medr", "meanr"]
    assert further["i2t"]["r10"] <= further["i2t"]["r50"]
    assert further["i2t"]["r1"] <= further["i2t"]["r3"] <= further["i2t"]["r5"]
    assert further["rsum"] == plain["rsum"]


@pytest.mark.parametrize("depths", [(0,), (-1, 5), (2.5,)])
def test_a_depth_that_is_none_is_an_error(depths):
    with pytest.raises(ValueError, match="whole numbers from 1"):
        recall_metrics(noisy_gallery(5), recall_at=depths)


@given(galleries())
def test_monotone_rescaling_changes_no_rank(gallery):
    similarity, owners = gallery
    plain = ranks(similarity, owners)
    scaled = ranks(np.exp(3.0 * similarity.astype(np.float64)) - 7.0, owners)
    assert scaled[0].tolist() == plain[0].tolist()
    assert scaled[1].tolist() == plain[1].tolist()
    assert scaled[2] == plain[2]


@given(galleries(), st.data(), st.integers(1, 5))
def test_a_better_wrong_candidate_never_helps(gallery, data, more):
    similarity, owners = gallery
    image = data.draw(st.integers(0, len(similarity) - 1))
    caption = data.draw(st.integers(0, len(owners) - 1))
    if owners[caption] == image:
        return
    before = ranks(similarity, owners)
    worse = similarity.astype(np.float64)
    worse[image, caption] += more
    after = ranks(worse, owners)
    assert (after[0] >= before[0]).all()
    assert (after[1] >= before[1]).all()


def test_the_shared_recording_where_it_is_there():
    path = Path(__file__).parents[3] / "shared" / "official" / "recall_metrics" / "expected.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with np.load(path) as recorded, np.load(GOLDEN) as golden:
        result = recall_metrics(recorded["similarity"])
        for direction in ("i2t", "t2i"):
            values = [result[direction][key] for key in ("r1", "r5", "r10", "medr", "meanr")]
            np.testing.assert_allclose(values, recorded[direction], rtol=0, atol=1e-10)
            np.testing.assert_array_equal(recorded[direction], golden[direction])


@pytest.mark.parametrize("depth", [1, 5, 10, 50])
def test_torchmetrics_finds_the_same_recalls(depth):
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    similarity = noisy_gallery(60, k=3)
    owners = np.repeat(np.arange(60), 3)
    ours = recall_metrics(similarity, 3, recall_at=(depth,))
    scores = torch.from_numpy(similarity)
    right = torch.from_numpy(owners[None] == np.arange(60)[:, None])
    for direction, queries, answers in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        hits = [
            retrieval.retrieval_hit_rate(query, answer, top_k=depth)
            for query, answer in zip(queries, answers, strict=True)
        ]
        assert ours[direction][f"r{depth}"] == pytest.approx(100 * float(torch.stack(hits).mean()))
