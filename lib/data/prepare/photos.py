"""What every source hands out: a photo, its captions, and the split it is said to be in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lib.errors import InputError

SPLIT_NAMES = {
    "train": ("train", "training", "restval"),
    "dev": ("dev", "val", "valid", "validation"),
    "test": ("test", "testing", "testall"),
}
SPLIT_OF = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass
class Photo:
    """An image with its captions; `name` is its path in the image folder, with / as separator."""

    name: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None  # train, dev or test where the source says so
    image_id: str | None = None  # where the source has one
    file: Path | None = None  # to be linked or copied; None where the image lies in its place


@dataclass
class Source:
    """Photos in the source's order, and what a user should know about how they were read."""

    photos: list[Photo]
    notes: list[str] = field(default_factory=list)


def canonical_split(text: str, where: str) -> str:
    """Return train, dev or test for any usual spelling; InputError, naming `where`, otherwise."""
    split = SPLIT_OF.get(text.strip().lower())
    if split is None:
        known = ", ".join(SPLIT_OF)
        raise InputError(f"{where}: split {text.strip()!r} is none of {known}")
    return split


def clean_caption(text: str) -> str:
    """Return a caption on one line: any run of white space is one space."""
    return " ".join(text.split())


def merge(photos: Iterable[Photo]) -> list[Photo]:
    """Return one photo a name, captions in order; InputError where splits differ."""
    merged: dict[str, Photo] = {}
    for photo in photos:
        first = merged.setdefault(photo.name, photo)
        if first is photo:
            continue
        if first.split != photo.split:
            raise InputError(
                f"{photo.name} is in two splits, {first.split} and {photo.split}; an image "
                "belongs to one"
            )
        first.captions += photo.captions
    return list(merged.values())


def give_ids(photos: list[Photo]) -> None:
    """Give an id to each photo that has none: its name without the ending, whole where two agree.

    Names outlive a new order of the source, so dense texts go on fitting. Raises InputError where
    two photos have one id.
    """
    stems: dict[str, int] = {}
    for photo in photos:
        stem = str(PurePosixPath(photo.name).with_suffix(""))
        stems[stem] = stems.get(stem, 0) + 1
    seen: dict[str, str] = {}
    for photo in photos:
        if photo.image_id is None:
            stem = str(PurePosixPath(photo.name).with_suffix(""))
            photo.image_id = stem if stems[stem] == 1 else photo.name
        other = seen.setdefault(photo.image_id, photo.name)
        if other != photo.name:
            raise InputError(f"{other} and {photo.name} have one image id, {photo.image_id}")
