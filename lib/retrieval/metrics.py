"""From a similarity matrix to ranks, recall@K, rSum, folds, intervals and the printed table.

`similarity[i, j]` scores image i against caption j, higher is better. Image-to-text (I2T) ranks
the captions of a row, text-to-image (T2I) the images of a column. Numpy only; whatever
`np.asarray` takes will do, a CPU tensor included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
TABLE_WIDTH = 80
_CHUNK_VALUES = 2**22  # matrix entries looked at together: a few MiB of temporaries


def recall_metrics(
    similarity: ArrayLike,
    captions_per_image: int = 5,
    *,
    caption_images: ArrayLike | None = None,
) -> dict[str, Any]:
    """Return recall@1/5/10, median and mean rank of both directions, rSum and the tied queries.

    similarity: (N_images, N_captions), finite. captions_per_image: k, where captions i*k to
    i*k+k-1 belong to image i; `caption_images` (N_captions,), each caption's image row, takes its
    place where captions per image differ.

    The result is {"i2t": {"r1", "r5", "r10", "medr", "meanr"}, "t2i": {...}, "rsum", "ties"}:
    recall in percent 0-100, ranks from 1, rSum 0-600, ties a number of queries (see `ranks`).
    Raises ValueError for a value that is not finite, a shape that does not fit and an image
    without a caption.

    NOTE: medr is the plain median, x.5 where the two middle ranks of an even number of queries
    differ by an odd number. The evaluation code that the field inherits from VSE++ rounds that
    half down. The official recording (tests/golden) holds whole medians and agrees with both.
    """
    similarity, caption_images = _checked(similarity, captions_per_image, caption_images)
    return _summary(*_ranks(similarity, caption_images))


def ranks(similarity: ArrayLike, caption_images: ArrayLike) -> tuple[np.ndarray, np.ndarray, int]:
    """Return every image's rank (N_images,), every caption's rank (N_captions,) and the ties.

    A rank is 1 + the number of wrong candidates that score at least as high as the right one, so
    a tie counts against and the order of candidates never matters. An image's right candidate is
    its best caption; its other captions are not wrong ones. The third value counts the queries of
    both directions whose right candidate scores exactly the same as some wrong one. Errors as in
    `recall_metrics`.
    """
    return _ranks(*_checked(similarity, None, caption_images))


def fold_metrics(
    similarity: ArrayLike,
    folds: int = 5,
    captions_per_image: int = 5,
    *,
    caption_images: ArrayLike | None = None,
) -> dict[str, Any]:
    """Return `recall_metrics` averaged over equal, consecutive parts of the gallery.

    COCO 1K is the 5,000 test images in 5 folds. Each fold holds N_images/folds images and their
    captions. Recalls, ranks and rSum are means over the folds, ties their sum. Raises ValueError
    where the images do not divide into `folds`, else as `recall_metrics` does.
    """
    similarity, caption_images = _checked(similarity, captions_per_image, caption_images)
    parts = [_summary(*_ranks(*fold)) for fold in _folds(similarity, caption_images, folds)]
    metrics: dict[str, Any] = {
        direction: {
            name: float(np.mean([part[direction][name] for part in parts]))
            for name in parts[0][direction]
        }
        for direction in DIRECTIONS
    }
    metrics["rsum"] = float(np.mean([part["rsum"] for part in parts]))
    metrics["ties"] = sum(part["ties"] for part in parts)
    return metrics


def recall_intervals(
    similarity: ArrayLike,
    captions_per_image: int = 5,
    *,
    caption_images: ArrayLike | None = None,
    folds: int = 1,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Return [low, high] of each recall ("i2t_r1" ... "t2i_r10", percent) and of "rsum".

    Percentile bootstrap (Efron 1979) over the queries: images are drawn with replacement, each
    with all its captions, `repeats` times; ranks stay those against the full gallery. `level` in
    (0, 1) is the share of draws inside. With `folds` > 1 images are drawn within each fold and
    the folds averaged, which matches `fold_metrics`. The same seed gives the same intervals.
    Raises ValueError for `repeats` < 1, `level` outside (0, 1), else as `fold_metrics` does.
    """
    if repeats < 1 or not 0 < level < 1:
        raise ValueError(f"need repeats >= 1 and 0 < level < 1, not {repeats} and {level}")
    similarity, caption_images = _checked(similarity, captions_per_image, caption_images)
    rng = np.random.default_rng(seed)
    draws = np.mean(
        [
            _resampled_recalls(fold, owners, repeats, rng)
            for fold, owners in _folds(similarity, caption_images, folds)
        ],
        axis=0,
    )  # (repeats, 6)
    draws = np.column_stack([draws, draws.sum(1)])  # (repeats, 7)
    bounds = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)  # (2, 7)
    names = [f"{direction}_r{k}" for direction in DIRECTIONS for k in RECALL_AT] + ["rsum"]
    return {
        name: [float(low), float(high)] for name, (low, high) in zip(names, bounds.T, strict=True)
    }


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a plain-text table, at most 80 columns wide, with one row per split.

    results: split name -> what `recall_metrics` or `fold_metrics` returned; further keys are
    left alone. Columns: I2T and T2I R@1, R@5, R@10 in percent, and rSum. A name too long for the
    line is cut and ends in "…".
    """
    columns = [f"R@{k}" for k in RECALL_AT] * 2 + ["rSum"]
    room = TABLE_WIDTH - 7 * len(columns)
    names = {split: split if len(split) <= room else split[: room - 1] + "…" for split in results}
    width = max(map(len, ["split", *names.values()]))
    lines = [
        f"{'':{width}}{'I2T':>21}{'T2I':>21}".rstrip(),
        f"{'split':{width}}" + "".join(f"{column:>7}" for column in columns),
    ]
    lines.append("-" * len(lines[-1]))
    for split, metrics in results.items():
        values = [metrics[direction][f"r{k}"] for direction in DIRECTIONS for k in RECALL_AT]
        row = "".join(f"{value:7.1f}" for value in [*values, metrics["rsum"]])
        lines.append(f"{names[split]:{width}}{row}")
    return "\n".join(lines)


def _checked(
    similarity: ArrayLike, captions_per_image: int | None, caption_images: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix and each caption's image row as arrays, or raise ValueError."""
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(
            f"similarity must be a filled (N_images, N_captions) matrix, not {similarity.shape}"
        )
    if caption_images is None:
        caption_images = _consecutive_owners(similarity.shape, captions_per_image)
    else:
        caption_images = _checked_owners(similarity.shape, np.asarray(caption_images))
    _require_finite(similarity)
    return similarity, caption_images


def _consecutive_owners(shape: tuple[int, int], captions_per_image: int | None) -> np.ndarray:
    n_images, n_captions = shape
    if not isinstance(captions_per_image, Integral) or captions_per_image < 1:
        raise ValueError(
            f"captions_per_image must be a whole number from 1, not {captions_per_image!r}; where "
            "images differ in captions, give caption_images"
        )
    if n_images * captions_per_image != n_captions:
        raise ValueError(
            f"similarity has {n_captions} captions, but {n_images} images with "
            f"{captions_per_image} captions each make {n_images * captions_per_image}; where "
            "images differ in captions, give caption_images"
        )
    return np.repeat(np.arange(n_images), captions_per_image)


def _checked_owners(shape: tuple[int, int], caption_images: np.ndarray) -> np.ndarray:
    n_images, n_captions = shape
    if caption_images.shape != (n_captions,) or caption_images.dtype.kind not in "iu":
        raise ValueError(
            f"caption_images must hold {n_captions} whole numbers, one image row per caption of "
            f"similarity, not {caption_images.dtype} of shape {caption_images.shape}"
        )
    # A negative row would silently count from the end.
    if caption_images.min() < 0 or caption_images.max() >= n_images:
        raise ValueError(
            f"caption_images must lie in 0 to {n_images - 1}, the image rows of similarity, not in "
            f"{caption_images.min()} to {caption_images.max()}"
        )
    bare = np.flatnonzero(np.bincount(caption_images, minlength=n_images) == 0)
    if len(bare):
        raise ValueError(
            f"{len(bare)} of {n_images} images have no caption, the first is image {bare[0]}; "
            "leave images without captions out of the similarity matrix"
        )
    return caption_images.astype(np.intp)


def _require_finite(similarity: np.ndarray) -> None:
    bad, first = 0, None
    for rows in _row_chunks(similarity.shape):
        finite = np.isfinite(similarity[rows])
        missing = finite.size - np.count_nonzero(finite)
        if missing and first is None:
            row, caption = divmod(int(np.argmin(finite)), finite.shape[1])
            first = (rows.start + row, caption)
        bad += missing
    if first is not None:
        raise ValueError(
            f"similarity has {bad} values that are NaN or infinite, the first is "
            f"{similarity[first]} at image {first[0]}, caption {first[1]}; look for a diverged "
            "checkpoint or a half-precision overflow"
        )


def _row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _ranks(
    similarity: np.ndarray, caption_images: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    n_images, n_captions = similarity.shape
    right = similarity[caption_images, np.arange(n_captions)]  # (N_captions,)
    order = np.argsort(caption_images, kind="stable")
    starts = np.searchsorted(caption_images[order], np.arange(n_images))
    best = np.maximum.reduceat(right[order], starts)  # (N_images,) best right caption

    i2t_at_least, i2t_equal = np.zeros((2, n_images), dtype=np.int64)
    t2i_at_least, t2i_equal = np.zeros((2, n_captions), dtype=np.int64)
    for rows in _row_chunks(similarity.shape):
        chunk = similarity[rows]  # (rows, N_captions)
        i2t_at_least[rows] = np.count_nonzero(chunk >= best[rows, None], axis=1)
        i2t_equal[rows] = np.count_nonzero(chunk == best[rows, None], axis=1)
        t2i_at_least += np.count_nonzero(chunk >= right, axis=0)
        t2i_equal += np.count_nonzero(chunk == right, axis=0)

    # Right candidates met themselves in these counts: an image those of its captions that score
    # its best, a caption its one image.
    own = np.bincount(caption_images[right == best[caption_images]], minlength=n_images)
    ties = np.count_nonzero(i2t_equal > own) + np.count_nonzero(t2i_equal > 1)
    return 1 + i2t_at_least - own, t2i_at_least, int(ties)


def _summary(i2t_ranks: np.ndarray, t2i_ranks: np.ndarray, ties: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for direction, found in zip(DIRECTIONS, (i2t_ranks, t2i_ranks), strict=True):
        metrics[direction] = {
            f"r{k}": 100 * np.count_nonzero(found <= k) / len(found) for k in RECALL_AT
        }
        metrics[direction] |= {"medr": float(np.median(found)), "meanr": float(np.mean(found))}
    metrics["rsum"] = sum(metrics[way][f"r{k}"] for way in DIRECTIONS for k in RECALL_AT)
    metrics["ties"] = ties
    return metrics


def _folds(
    similarity: np.ndarray, caption_images: np.ndarray, folds: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each fold's matrix and its captions' image rows, counted from the fold's first."""
    n_images = len(similarity)
    if folds < 1 or n_images % folds:
        raise ValueError(f"{n_images} images do not divide into {folds} equal folds")
    size = n_images // folds
    for start in range(0, n_images, size):
        captions = np.flatnonzero(caption_images // size == start // size)
        owners = caption_images[captions] - start
        if captions[-1] - captions[0] + 1 == len(captions):
            captions = slice(captions[0], captions[-1] + 1)  # neighbours: a view, not a copy
        yield similarity[start : start + size, captions], owners


def _resampled_recalls(
    similarity: np.ndarray, caption_images: np.ndarray, repeats: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the (repeats, 6) recalls of `repeats` draws of images, I2T before T2I."""
    n_images = len(similarity)
    i2t_ranks, t2i_ranks, _ = _ranks(similarity, caption_images)
    i2t_hits = np.stack([i2t_ranks <= k for k in RECALL_AT], axis=1)  # (N_images, 3)
    t2i_hits = np.stack(
        [np.bincount(caption_images[t2i_ranks <= k], minlength=n_images) for k in RECALL_AT],
        axis=1,
    )  # (N_images, 3) captions of the image that find it
    captions = np.bincount(caption_images, minlength=n_images)  # (N_images,)

    per_image = np.column_stack([i2t_hits, t2i_hits, captions]).astype(float)  # (N_images, 7)
    recalls = np.empty((repeats, 2 * len(RECALL_AT)))
    for repeat in range(repeats):
        times = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
        *hits, drawn_captions = times @ per_image
        recalls[repeat] = 100 * np.array(hits) / np.repeat([n_images, drawn_captions], 3)
    return recalls
