"""What `scenes_facts.jsonl` knows of a split: siblings, and where named things lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lib.data.splits import Split
from lib.errors import InputError


def sibling_captions(root: str | Path, split: Split) -> np.ndarray:
    """Return for each caption the one of the same number of the sibling image, (N_captions,).

    -1 where the split lacks it. Raises InputError where the facts can't be read.
    """
    row_of = {image_id: row for row, image_id in enumerate(split.image_ids)}
    facts = _facts(root, split)
    first = np.searchsorted(split.caption_image, np.arange(len(split.image_ids)))
    found = np.full(len(split.captions), -1)
    for index, row in enumerate(split.caption_image.tolist()):
        sibling = row_of.get(str(facts[split.image_ids[row]]["sibling_id"]))
        if sibling is not None:
            found[index] = first[sibling] + index - first[row]
    return found


def named_coverage(root: str | Path, split: Split, grid: tuple[int, int]) -> np.ndarray:
    """Return how much of the boxes of the things that each caption names lies in each patch.

    (N_captions, rows · columns), each row a share of its caption's boxes that sums to 1; where
    boxes overlap their common area counts once. Raises InputError where the facts can't be read.
    """
    facts, size = _facts(root, split), _image_size(root)
    coverage = np.zeros((len(split.captions), grid[0] * grid[1]))
    number = 0
    for index, row in enumerate(split.caption_image.tolist()):
        number = number + 1 if index and row == split.caption_image[index - 1] else 0
        image = facts[split.image_ids[row]]
        boxes = [image["things"][thing]["box"] for thing in image["named"][number]]
        coverage[index] = _in_patches(_covered(boxes, size), grid)
    return coverage / coverage.sum(1, keepdims=True)


def _covered(boxes: list[list[int]], size: int) -> np.ndarray:
    covered = np.zeros((size, size))
    for x0, y0, x1, y1 in boxes:
        covered[y0:y1, x0:x1] = 1
    return covered


def _in_patches(covered: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the covered area of every patch, row by row; a pixel on a border is shared out."""
    rows, columns = (_shares(len(covered), count) for count in grid)
    return (rows @ covered @ columns.T).ravel()


def _shares(size: int, count: int) -> np.ndarray:
    """Return the share of each of `size` pixels in each of `count` strips, (count, size)."""
    borders = np.arange(count + 1)[:, None] * size / count
    below = np.clip(
        borders - np.arange(size)[None], 0, 1
    )  # of each pixel, what lies before a border
    return below[1:] - below[:-1]


def _facts(root: str | Path, split: Split) -> dict[str, dict]:
    """Return what is known of each image of the split, by its id."""
    path = Path(root) / "scenes_facts.jsonl"
    with _readable(path):
        images = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {str(image["image_id"]): image for image in images}
        return {one: found[one] for one in split.image_ids}


def _image_size(root: str | Path) -> int:
    path = Path(root) / "scenes.json"
    with _readable(path):
        return int(json.loads(path.read_text(encoding="utf-8"))["image_size"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a missing or damaged file provokes into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not say what it should ({error!r:.120}); remove the folder, and scenes "
            "are drawn anew"
        ) from None
