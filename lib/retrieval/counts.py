"""Ranks of a similarity matrix that is never whole: counted block by block of images.

A rank is a count of candidates that score at least as high as the right one. Where every caption's
score with its own image is known first, blocks of scores can be counted in any order, on any
machine, and thrown away. Numpy only; ties count as in `metrics.ranks`, to the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lib.retrieval.metrics import QueryRanks

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class OwnScores:
    """What every count compares with: each caption's score with its own image, (N_captions,)."""

    right: np.ndarray  # (N_captions,) float32
    caption_images: np.ndarray  # (N_captions,) row of each caption's image
    best: np.ndarray  # (N_images,) of each image, its best caption's
    ties: np.ndarray  # (N_images,) of each image's captions, those that score the best

    @classmethod
    def of(cls, right: np.ndarray, caption_images: np.ndarray, images: int) -> OwnScores:
        """Return the scores with what follows from them; every image has a caption."""
        best = np.full(images, -np.inf, right.dtype)
        np.maximum.at(best, caption_images, right)
        ties = np.bincount(caption_images[right == best[caption_images]], minlength=images)
        return cls(right, caption_images, best, ties)


class BlockCounts:
    """What the images `first` to `last` - 1 add to the ranks; each within its fold of the images.

    Memory is a few numbers a caption, whatever the images.
    """

    def __init__(self, own: OwnScores, first: int, last: int, folds: int = 1) -> None:
        self.own, self.first, self.last = own, first, last
        self.fold_size = len(own.best) // folds
        kind = np.uint16 if last - first < 2**16 else np.uint32
        self.i2t_at_least: np.ndarray = np.zeros(last - first, np.int64)
        self.i2t_equal: np.ndarray = np.zeros(last - first, np.int64)
        self.t2i_at_least: np.ndarray = np.zeros(len(own.right), kind)
        self.t2i_equal: np.ndarray = np.zeros(len(own.right), kind)

    def add(self, row: int, caption: int, scores: np.ndarray) -> None:
        """Count scores (R, T) of the images from `row` on with the captions from `caption` on.

        The own pairs among them are set to the scores known before: those of another machine may
        differ in the last bit, and an item must always meet itself.
        """
        own, rows = self.own, slice(row, row + scores.shape[0])
        captions = slice(caption, caption + scores.shape[1])
        owners, right = own.caption_images[captions], own.right[captions]
        best = own.best[rows, None]
        mine = np.flatnonzero((owners >= rows.start) & (owners < rows.stop))
        scores[owners[mine] - row, mine] = right[mine]
        counted = self._one_fold(rows, owners)
        i2t, t2i = slice(row - self.first, rows.stop - self.first), captions
        self.i2t_at_least[i2t] += np.count_nonzero((scores >= best) & counted, axis=1)
        self.i2t_equal[i2t] += np.count_nonzero((scores == best) & counted, axis=1)
        kind = self.t2i_equal.dtype
        self.t2i_at_least[t2i] += np.count_nonzero((scores >= right) & counted, 0).astype(kind)
        self.t2i_equal[t2i] += np.count_nonzero((scores == right) & counted, 0).astype(kind)

    def _one_fold(self, rows: slice, owners: np.ndarray) -> np.ndarray | bool:
        """Return which pairs lie in one fold, (R, T); True where there is but one."""
        if self.fold_size == len(self.own.best):
            return True
        of_rows = np.arange(rows.start, rows.stop) // self.fold_size
        return of_rows[:, None] == (owners // self.fold_size)[None]

    def arrays(self) -> Arrays:
        """Return the block's ranks I2T, which are whole, and what it adds to the ranks T2I."""
        own = self.own
        met = own.ties[self.first : self.last]
        owners = own.caption_images
        itself = (owners >= self.first) & (owners < self.last)
        return {
            "i2t": 1 + self.i2t_at_least - met,
            "i2t_tied": self.i2t_equal > met,
            "t2i": self.t2i_at_least,
            "t2i_tied": np.flatnonzero(self.t2i_equal > itself),
        }


class RankSum:
    """The ranks that all blocks' arrays make together, added in the order of their images."""

    def __init__(self, caption_images: np.ndarray, folds: int = 1) -> None:
        self.caption_images, self.folds = caption_images, folds
        self.i2t: list[np.ndarray] = []
        self.t2i = np.zeros(len(caption_images), np.int64)
        self.i2t_ties = 0
        self.t2i_tied = np.zeros(len(caption_images), bool)

    def add(self, block: Mapping[str, np.ndarray]) -> None:
        """Add what `BlockCounts.arrays` returned of the next block."""
        self.i2t.append(block["i2t"])
        self.t2i += block["t2i"]
        self.i2t_ties += int(np.count_nonzero(block["i2t_tied"]))
        self.t2i_tied[block["t2i_tied"]] = True

    def ranks(self) -> QueryRanks:
        """Return the ranks, when every block is in."""
        ties = self.i2t_ties + int(np.count_nonzero(self.t2i_tied))
        return QueryRanks(np.concatenate(self.i2t), self.t2i, self.caption_images, self.folds, ties)
