"""Ranks counted block by block against those of the whole matrix, ties and folds included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.retrieval.counts import BlockCounts, OwnScores, RankSum
from lib.retrieval.metrics import QueryRanks, query_ranks


def streamed(
    matrix: np.ndarray, owners: np.ndarray, folds: int, block: int, step: int
) -> QueryRanks:
    """The ranks from blocks of images and groups of captions, seen in another order."""
    images, captions = matrix.shape
    own = OwnScores.of(matrix[owners, np.arange(captions)], owners, images)
    total = RankSum(owners, folds)
    for first in range(0, images, block):
        last = min(first + block, images)
        counts = BlockCounts(own, first, last, folds)
        for caption in reversed(range(0, captions, step)):
            for row in range(first, last, 2):
                stop = min(row + 2, last)
                counts.add(row, caption, matrix[row:stop, caption : caption + step].copy())
        total.add(counts.arrays())
    return total.ranks()


@given(seed=st.integers(0, 2**31), levels=st.integers(1, 30), block=st.integers(1, 13))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("folds", [1, 3])
def test_blocks_give_the_ranks_of_the_whole(seed, levels, block, folds):
    rng = np.random.default_rng(seed)
    images, captions = 12, 31
    owners = np.concatenate([np.arange(images), rng.integers(images, size=captions - images)])
    rng.shuffle(owners)  # captions of an image lie anywhere
    matrix = rng.integers(levels, size=(images, captions)).astype(np.float32)  # full of ties
    whole = query_ranks(matrix, caption_images=owners, folds=folds)
    found = streamed(matrix, owners, folds, block, step=7)
    np.testing.assert_array_equal(found.i2t, whole.i2t)
    np.testing.assert_array_equal(found.t2i, whole.t2i)
    assert found.ties == whole.ties
    assert found.metrics() == whole.metrics()


def test_an_own_pair_that_another_machine_scored_a_bit_lower_still_meets_itself():
    matrix = np.array([[0.5, 0.1], [0.2, 0.7]], np.float32)
    owners = np.arange(2)
    own = OwnScores.of(np.nextafter(matrix[owners, owners], np.float32(1)), owners, 2)
    counts, total = BlockCounts(own, 0, 2), RankSum(owners)
    counts.add(0, 0, matrix.copy())
    total.add(counts.arrays())
    assert total.ranks().t2i.tolist() == total.ranks().i2t.tolist() == [1, 1]
    assert total.ranks().ties == 0
