"""From a similarity matrix to ranks, and from ranks to recall@K, rSum and means over folds.

`similarity[i, j]` scores image i against caption j, higher is better. Image-to-text (I2T) ranks
the captions of a row, text-to-image (T2I) the images of a column. Numpy only; whatever
`np.asarray` takes will do, a CPU tensor included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
_CHUNK_VALUES = 2**22  # matrix entries looked at together: a few MiB of temporaries


@dataclass(frozen=True)
class QueryRanks:
    """The rank of every query of both directions, from 1: all that recalls are computed from."""

    i2t: np.ndarray  # (N_images,) of each image's best caption
    t2i: np.ndarray  # (N_captions,) of each caption's image
    caption_images: np.ndarray  # (N_captions,) row of each caption's image
    folds: int = 1  # equal consecutive parts of the images that were ranked apart
    ties: int = 0  # queries of both directions whose right candidate ties with a wrong one

    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (image rows, captions), as indices, of each fold."""
        size = len(self.i2t) // self.folds
        fold_of = self.caption_images // size
        return [
            (np.arange(fold * size, (fold + 1) * size), np.flatnonzero(fold_of == fold))
            for fold in range(self.folds)
        ]

    def metrics(self, recall_at: Sequence[int] = RECALL_AT) -> dict[str, Any]:
        """Return what `recall_metrics` does, as means over the folds; ties are their sum."""
        parts = [
            _summary((self.i2t[images], self.t2i[captions]), recall_at)
            for images, captions in self.parts()
        ]
        metrics: dict[str, Any] = {
            way: {
                name: float(np.mean([part[way][name] for part in parts])) for name in parts[0][way]
            }
            for way in DIRECTIONS
        }
        metrics["rsum"] = float(np.mean([part["rsum"] for part in parts]))
        metrics["ties"] = self.ties
        return metrics


def recall_metrics(
    similarity: ArrayLike,
    captions_per_image: int = 5,
    *,
    caption_images: ArrayLike | None = None,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Any]:
    """Return recall@K, median and mean rank of both directions, rSum and the tied queries.

    similarity: (N_images, N_captions), finite. captions_per_image: k, where captions i*k to
    i*k+k-1 belong to image i; `caption_images` (N_captions,), each caption's image row, takes its
    place where captions per image differ. `recall_at` adds to the K of 1, 5 and 10.

    The result is {"i2t": {"r1", "r5", "r10", "medr", "meanr"}, "t2i": {...}, "rsum", "ties"}:
    recall in percent 0-100, ranks from 1, rSum 0-600 (always of 1, 5 and 10), ties a number of
    queries (see `ranks`). Raises ValueError for a value that is not finite, a shape that does not
    fit and an image without a caption.

    NOTE: medr is the plain median, x.5 where the two middle ranks of an even number of queries
    differ by an odd number. The evaluation code that the field inherits from VSE++ rounds that
    half down. The official recording (tests/golden) holds whole medians and agrees with both.
    """
    return query_ranks(similarity, captions_per_image, caption_images=caption_images).metrics(
        recall_at
    )


def ranks(similarity: ArrayLike, caption_images: ArrayLike) -> tuple[np.ndarray, np.ndarray, int]:
    """Return every image's rank (N_images,), every caption's rank (N_captions,) and the ties.

    A rank is 1 + the number of wrong candidates that score at least as high as the right one, so
    a tie counts against and the order of candidates never matters. An image's right candidate is
    its best caption; its other captions are not wrong ones. The third value counts the queries of
    both directions whose right candidate scores exactly the same as some wrong one. Errors as in
    `recall_metrics`.
    """
    return _ranks(*_checked(similarity, None, caption_images))


def query_ranks(
    similarity: ArrayLike,
    captions_per_image: int = 5,
    *,
    caption_images: ArrayLike | None = None,
    folds: int = 1,
) -> QueryRanks:
    """Return the ranks of all queries; with `folds` > 1 each within its part of the gallery.

    Errors as in `recall_metrics`, and ValueError where the images do not divide into `folds`.
    """
    similarity, caption_images = _checked(similarity, captions_per_image, caption_images)
    n_images, n_captions = similarity.shape
    if folds < 1 or n_images % folds:
        raise ValueError(f"{n_images} images do not divide into {folds} equal folds")
    empty = np.zeros(n_images, np.int64), np.zeros(n_captions, np.int64)
    found = QueryRanks(*empty, caption_images, folds)
    ties = 0
    for images, captions in found.parts():
        part = similarity[images[0] : images[-1] + 1, _as_slice(captions)]
        owners = caption_images[captions] - images[0]
        found.i2t[images], found.t2i[captions], tied = _ranks(part, owners)
        ties += tied
    return QueryRanks(found.i2t, found.t2i, caption_images, folds, ties)


def fold_metrics(
    similarity: ArrayLike,
    folds: int = 5,
    captions_per_image: int = 5,
    *,
    caption_images: ArrayLike | None = None,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Any]:
    """Return `recall_metrics` averaged over equal, consecutive parts of the gallery.

    COCO 1K is the 5,000 test images in 5 folds. Each fold holds N_images/folds images and their
    captions. Recalls, ranks and rSum are means over the folds, ties their sum. Raises ValueError
    where the images do not divide into `folds`, else as `recall_metrics` does.
    """
    found = query_ranks(similarity, captions_per_image, caption_images=caption_images, folds=folds)
    return found.metrics(recall_at)


def recall_depths(recall_at: Sequence[int] = RECALL_AT) -> tuple[int, ...]:
    """Return the K of all recalls, ascending: those asked for and the field's 1, 5 and 10."""
    if any(not isinstance(k, Integral) or k < 1 for k in recall_at):
        raise ValueError(f"recall is at whole numbers from 1, not at {list(recall_at)}")
    return tuple(sorted({*RECALL_AT, *map(int, recall_at)}))


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


def _summary(
    found: tuple[np.ndarray, np.ndarray], recall_at: Sequence[int] = RECALL_AT
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for direction, one in zip(DIRECTIONS, found, strict=True):
        metrics[direction] = {
            f"r{k}": 100 * np.count_nonzero(one <= k) / len(one) for k in recall_depths(recall_at)
        }
        metrics[direction] |= {"medr": float(np.median(one)), "meanr": float(np.mean(one))}
    metrics["rsum"] = sum(metrics[way][f"r{k}"] for way in DIRECTIONS for k in RECALL_AT)
    return metrics


def _as_slice(captions: np.ndarray) -> slice | np.ndarray:
    """Return neighbours as a slice: a view of the matrix, not a copy."""
    if captions[-1] - captions[0] + 1 == len(captions):
        return slice(captions[0], captions[-1] + 1)
    return captions
