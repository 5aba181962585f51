"""Resampled images: 95 % intervals of recalls, and of the difference between two results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lib.retrieval.metrics import DIRECTIONS, RECALL_AT, QueryRanks, recall_depths

_COUNTS_AT_ONCE = 2**22  # how often each image is drawn, for as many draws as this makes


@dataclass(frozen=True)
class Difference:
    """How much higher A's recall (percent) or rSum is than B's, with its interval."""

    a: float
    b: float
    mean: float
    low: float
    high: float
    p: float  # two-sided

    @property
    def is_shown(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def rank_intervals(
    found: QueryRanks,
    recall_at: Sequence[int] = RECALL_AT,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Return [low, high] of each recall ("i2t_r1" ... "t2i_r10", percent) and of "rsum".

    Percentile bootstrap (Efron 1979) over the queries: images are drawn with replacement, each
    with all its captions, `repeats` times; ranks stay those against the full gallery. `level` in
    (0, 1) is the share of draws inside. With folds images are drawn within each fold and the folds
    averaged, as the recalls are. The same seed gives the same intervals. Raises ValueError for
    `repeats` < 1 and `level` outside (0, 1).
    """
    _check(repeats, level)
    (draws,) = recall_draws([found], recall_at, repeats, np.random.default_rng(seed))
    bounds = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)  # (2, names)
    return {
        name: [float(low), float(high)]
        for name, (low, high) in zip(recall_names(recall_at), bounds.T, strict=True)
    }


def paired_differences(
    a: Sequence[QueryRanks],
    b: Sequence[QueryRanks],
    recall_at: Sequence[int] = RECALL_AT,
    *,
    repeats: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Return the Difference of each recall and of "rsum" between two results, a run a seed.

    Paired bootstrap: each draw takes the same images for all runs, which must have ranked the same
    images and captions; where a side holds several runs its seeds are drawn too, independently of
    the other side's. p is twice the share of draws on the far side of 0, at least 2/(repeats + 1).

    NOTE: n seeds drawn from n spread by sqrt((n - 1)/n) too little, by a fifth for three; the
    deviations from the mean over seeds are stretched by the inverse (Davison & Hinkley 1997, 2.3).

    Raises ValueError where the runs' images or captions differ, `repeats` < 1 or `level` is
    outside (0, 1).
    """
    _check(repeats, level)
    runs = [*a, *b]
    if any(not _alike(runs[0], other) for other in runs[1:]):
        raise ValueError("the results do not rank the same images and captions in the same order")
    rng = np.random.default_rng(seed)
    draws = recall_draws(runs, recall_at, repeats, rng)  # (runs, repeats, names)
    points = np.stack([_point(run, recall_at) for run in runs])  # (runs, names)
    sides = slice(None, len(a)), slice(len(a), None)
    drawn_a, drawn_b = (_over_seeds(draws[side], rng) for side in sides)
    differences = drawn_a - drawn_b  # (repeats, names)
    means_a, means_b = (points[side].mean(0) for side in sides)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2], axis=0)
    below = np.count_nonzero(differences <= 0, axis=0)
    above = np.count_nonzero(differences >= 0, axis=0)
    p = np.minimum(1.0, 2 * (np.minimum(below, above) + 1) / (repeats + 1))
    columns = (means_a, means_b, means_a - means_b, low, high, p)
    return {
        name: Difference(*(float(column[i]) for column in columns))
        for i, name in enumerate(recall_names(recall_at))
    }


def mean_interval(
    runs: Sequence[QueryRanks], *, repeats: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return (low, high) of the mean rSum over seeds; images and seeds are drawn as above.

    Raises ValueError as `paired_differences` does.
    """
    _check(repeats, level)
    if any(not _alike(runs[0], other) for other in runs[1:]):
        raise ValueError("the results do not rank the same images and captions in the same order")
    rng = np.random.default_rng(seed)
    drawn = _over_seeds(recall_draws(runs, RECALL_AT, repeats, rng), rng)[:, -1]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(values: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979), in the order they came."""
    corrected, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(np.argsort(values, kind="stable")):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = highest
    return corrected


def recall_names(recall_at: Sequence[int] = RECALL_AT) -> list[str]:
    """Return the names of what is resampled: "i2t_r1" ..., "t2i_r1" ..., "rsum"."""
    return [f"{way}_r{k}" for way in DIRECTIONS for k in recall_depths(recall_at)] + ["rsum"]


def recall_draws(
    runs: Sequence[QueryRanks], recall_at: Sequence[int], repeats: int, rng: np.random.Generator
) -> np.ndarray:
    """Return what each draw of images gives each run, (runs, repeats, names), percent.

    A draw takes the same images for every run; the runs share their images, captions and folds.
    """
    depths = recall_depths(recall_at)
    ways = len(depths)
    total = np.zeros((len(runs), repeats, 2 * ways))
    hits = np.stack([_hits(run, depths) for run in runs], axis=1)  # (N_images, runs, 2 ways)
    captions = np.bincount(runs[0].caption_images, minlength=len(hits)).astype(float)
    for images, _ in runs[0].parts():
        table = np.column_stack([hits[images].reshape(len(images), -1), captions[images]])
        for rows, counts in _drawn_counts(len(images), repeats, rng):
            sums = counts @ table  # (draws, runs · 2 ways + 1)
            found = sums[:, :-1].reshape(-1, len(runs), 2 * ways)
            found[:, :, :ways] /= len(images)
            found[:, :, ways:] /= sums[:, -1, None, None]
            total[:, rows] += 100 * found.transpose(1, 0, 2)
    total /= runs[0].folds
    summed = [way * ways + depths.index(k) for way in range(2) for k in RECALL_AT]
    return np.concatenate([total, total[:, :, summed].sum(2, keepdims=True)], axis=2)


def _check(repeats: int, level: float) -> None:
    if repeats < 1 or not 0 < level < 1:
        raise ValueError(f"need repeats >= 1 and 0 < level < 1, not {repeats} and {level}")


def _alike(one: QueryRanks, other: QueryRanks) -> bool:
    same = np.array_equal(one.caption_images, other.caption_images)
    return same and len(one.i2t) == len(other.i2t) and one.folds == other.folds


def _point(run: QueryRanks, recall_at: Sequence[int]) -> np.ndarray:
    metrics = run.metrics(recall_at)
    recalls = [metrics[way][f"r{k}"] for way in DIRECTIONS for k in recall_depths(recall_at)]
    return np.array([*recalls, metrics["rsum"]])


def _hits(run: QueryRanks, depths: Sequence[int]) -> np.ndarray:
    """Return (N_images, 2·depths): whether the image finds a caption, how many captions find it."""
    n_images = len(run.i2t)
    i2t = [run.i2t <= k for k in depths]
    t2i = [np.bincount(run.caption_images[run.t2i <= k], minlength=n_images) for k in depths]
    return np.stack([*i2t, *t2i], axis=1).astype(float)


def _drawn_counts(
    n_images: int, repeats: int, rng: np.random.Generator
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (which draws, how often each took each image (draws, N_images)) in chunks."""
    step = max(1, _COUNTS_AT_ONCE // n_images)
    for start in range(0, repeats, step):
        draws = min(step, repeats - start)
        drawn = rng.integers(n_images, size=(draws, n_images))
        drawn += n_images * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * n_images)
        yield slice(start, start + draws), counts.reshape(draws, n_images).astype(float)


def _over_seeds(draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (repeats, names): the mean over seeds drawn anew in each draw; see the NOTE above."""
    seeds, repeats, _ = draws.shape
    centre = draws.mean(0)
    if seeds == 1:
        return centre
    chosen = rng.integers(seeds, size=(repeats, seeds))
    picked = draws[chosen, np.arange(repeats)[:, None]].mean(1)  # (repeats, names)
    return centre + np.sqrt(seeds / (seeds - 1)) * (picked - centre)
