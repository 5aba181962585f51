"""Which split a photo goes to: fractions drawn by a seed, lists of files, or what the source says.

Whole groups (near-duplicates) are drawn, so that no picture is trained on and asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.layout import SPLITS
from lib.data.prepare.photos import Photo
from lib.errors import InputError
from lib.files import text_lines


@dataclass(frozen=True)
class SplitPlan:
    """Shares of train, dev and test, or three files that list the images of each."""

    fractions: tuple[float, ...] = ()
    lists: tuple[Path, ...] = ()


def parse_plan(text: str) -> SplitPlan:
    """Return the plan of 0.8/0.1/0.1 or of train.txt,dev.txt,test.txt. Raises InputError."""
    files = text.split(",")
    if len(files) == 3:
        return SplitPlan(lists=tuple(Path(one.strip()) for one in files))
    try:
        fractions = tuple(float(part) for part in text.split("/"))
    except ValueError:
        fractions = ()
    whole = abs(sum(fractions) - 1) < 1e-6
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] == 0 or not whole:
        raise InputError(
            f"--split {text}: give shares of train/dev/test that add up to 1, as 0.8/0.1/0.1, or "
            "three files that list images, as train.txt,dev.txt,test.txt"
        )
    return SplitPlan(fractions=fractions)


def split_by_lists(photos: Sequence[Photo], lists: Sequence[Path]) -> list[str]:
    """Put each photo into the split whose file lists its name; return notes on the others.

    A photo that no file lists is left without a split. Raises InputError for a name in two files.
    """
    of: dict[str, str] = {}
    for split, path in zip(SPLITS, lists, strict=True):
        for number, line in enumerate(text_lines(path, "--split names it"), start=1):
            name = line.strip().rsplit("/", 1)[-1].rsplit(".", 1)[0]
            if name and of.setdefault(name, split) != split:
                raise InputError(f"{path}:{number}: {line.strip()} is listed in {of[name]} already")
    for photo in photos:
        photo.split = of.get(photo.name.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    without = sum(photo.split is None for photo in photos)
    return [f"{without} images are in none of the three lists and are left out"] if without else []


def draw_splits(groups: Sequence[int], fractions: Sequence[float], seed: int) -> list[str]:
    """Return the split of each image, drawn by the seed; one group is never in two splits.

    Groups are dealt in random order, each to the split that lacks most of its share, the largest
    first, so that the counts come within a group of the shares. Raises InputError where a split
    would stay empty.
    """
    labels, sizes = np.unique(np.asarray(groups), return_counts=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(-sizes[order], kind="stable")]
    room = np.array(fractions) * len(groups)
    split_of: dict[int, str] = {}
    for index in order:
        chosen = int(room.argmax())
        room[chosen] -= sizes[index]
        split_of[int(labels[index])] = SPLITS[chosen]
    splits = [split_of[int(group)] for group in groups]
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if fraction and split not in splits:
            raise InputError(
                f"--split: {len(groups)} images in {len(labels)} groups are too few to give "
                f"{split} its share of {fraction:g}"
            )
    return splits
