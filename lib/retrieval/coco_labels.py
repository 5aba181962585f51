"""CxC and ECCV Caption: COCO 5K against labels that know more than one right answer.

Labels and metrics are those of the package eccv_caption (Chun et al., ECCV 2022; Crisscrossed
Captions: Parekh et al., EACL 2021). COCO 1K is not taken from it.

NOTE: version 0.1.0 filters each ranked list by fold for COCO 1K and then reads its first entry: a
list of the 50 best, as its example makes, leaves some folds without any (IndexError, its issue 2)
and counts too few at 5 and 10. Our COCO 1K ranks within each fold; a test gives the package lists
of each query's own fold and finds the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.retrieval.metrics import DIRECTIONS, RECALL_AT, recall_depths

WAY_OUT = "python -m pip install eccv_caption (see requirements-extra.txt)"


def load_labels() -> Any:
    """Return the package's metrics object. Raises InputError where it is not installed."""
    check_installed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for ujson, which it does without
        from eccv_caption import Metrics

        return Metrics()


def check_installed() -> None:
    """Raise InputError where the package can't be imported; its labels are not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import eccv_caption  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--evaluate_cxc and --evaluate_eccv need eccv_caption ({error}): {WAY_OUT}"
            ) from None


def check_order(labels: Any, image_ids: Sequence[str], caption_images: np.ndarray) -> np.ndarray:
    """Return the COCO caption id of each caption, (25000,).

    Captions carry no ids of their own in `testall_caps.txt`: the package's list follows the same
    order, image by image and with COCO's ascending ids within one, which is checked against the id
    of every caption's image. Raises InputError with the first line that differs.
    """
    caption_ids = np.asarray(labels.coco_ids)
    owner = labels.coco_gts["t2i"]
    expected = [str(owner[int(one)][0]) for one in caption_ids]
    found = [image_ids[row] for row in caption_images]
    if len(found) != len(expected):
        raise InputError(
            "--evaluate_cxc and --evaluate_eccv are for COCO's test split of "
            f"{len(expected):,} captions, not for {len(found):,}"
        )
    wrong = [line for line, (a, b) in enumerate(zip(found, expected, strict=True), 1) if a != b]
    if wrong:
        line = wrong[0]
        raise InputError(
            f"caption {line} belongs to image {found[line - 1]}, in the labels of eccv_caption to "
            f"{expected[line - 1]}: they need COCO's own image ids in the order of testall_ids.txt"
        )
    return caption_ids


def cxc_metrics(
    matrix: np.ndarray,
    image_ids: Sequence[str],
    caption_images: np.ndarray,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Any]:
    """Return CxC recalls in percent, as `recall_metrics` has them, and rSum (0-600).

    28 captions without any label are no queries; labels count as right answers even where they
    leave out a caption's own image. Errors as in `load_labels` and `check_order`.
    """
    labels = load_labels()
    depths = recall_depths(recall_at)
    items = ranked_items(labels, labels.cxc_gts, matrix, image_ids, caption_images, max(depths))
    table: dict[str, Any] = {way: {} for way in DIRECTIONS}
    for k in depths:
        recalls = labels.cxc_recalls(items, "all", K=k)
        for way in DIRECTIONS:
            table[way][f"r{k}"] = 100 * float(recalls[way])
    table["rsum"] = sum(table[way][f"r{k}"] for way in DIRECTIONS for k in RECALL_AT)
    return table


def eccv_metrics(
    matrix: np.ndarray, image_ids: Sequence[str], caption_images: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return ECCV Caption's mAP@R, R-Precision and R@1 of both directions, percent.

    1,261 images and 1,332 captions are queries, against the whole gallery. Errors as in
    `load_labels` and `check_order`.
    """
    labels = load_labels()
    items = ranked_items(labels, labels.eccv_gts, matrix, image_ids, caption_images, 1)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that its verbose=False does not hide
        found = labels.eccv_metrics(items, "all")
    names = {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}
    return {
        way: {ours: 100 * float(found[theirs][way]) for ours, theirs in names.items()}
        for way in DIRECTIONS
    }


def ranked_items(
    labels: Any,
    answers: dict[str, dict[int, list[int]]],
    matrix: np.ndarray,
    image_ids: Sequence[str],
    caption_images: np.ndarray,
    depth: int,
) -> dict[str, dict[int, list[int]]]:
    """Return each labelled query's best items by COCO id, as the package reads them.

    Each list is `depth` long, or as long as the query has answers; ties count against: of equal
    scores right answers come last.
    """
    caption_ids = check_order(labels, image_ids, caption_images)
    images = np.array([int(one) for one in image_ids])
    ways = {
        "i2t": (images, caption_ids, matrix.__getitem__),
        "t2i": (caption_ids, images, matrix.T.__getitem__),
    }
    return {
        way: _best_items(answers[way], queries, items, scores_of, depth)
        for way, (queries, items, scores_of) in ways.items()
    }


def _best_items(
    answers: dict[int, list[int]],
    queries: np.ndarray,
    items: np.ndarray,
    scores_of: Callable[[int], np.ndarray],
    depth: int,
) -> dict[int, list[int]]:
    place = {int(item): index for index, item in enumerate(items)}
    found = {}
    for row, query in enumerate(map(int, queries)):
        if query not in answers:
            continue
        right = np.zeros(len(items), dtype=bool)
        right[[place[one] for one in answers[query] if one in place]] = True
        wanted = min(len(items), max(depth, len(answers[query])))
        found[query] = items[best_first(scores_of(row), right, wanted)].tolist()
    return found


def best_first(scores: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` highest scores, wrong ones before right ones in a tie."""
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    at_least = np.flatnonzero(scores >= least)
    order = np.lexsort((right[at_least], -scores[at_least]))
    return at_least[order[:count]]
