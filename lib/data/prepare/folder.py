"""A folder of pictures and a file of captions -> photos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lib.data.prepare.captions import Columns, read_captions
from lib.data.prepare.photos import (
    IMAGE_ENDINGS,
    Photo,
    Source,
    canonical_split,
    clean_caption,
    merge,
)
from lib.errors import InputError


def list_images(folder: Path) -> list[str]:
    """Return the images in a folder and below, sorted, as paths relative to it with /."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        inner = Path(place).relative_to(folder)
        images = (name for name in names if Path(name).suffix.lower() in IMAGE_ENDINGS)
        found += [(inner / name).as_posix() for name in images if not name.startswith(".")]
    return sorted(found)


def read_folder(folder: Path, captions: Path, wanted: Columns) -> Source:
    """Return the photos of a folder that the caption file has captions for.

    What has only a caption or only an image is left out and noted. Raises InputError where files
    can't be read or nothing fits.
    """
    names = list_images(folder)
    rows, notes = read_captions(captions, wanted)
    find = _Finder(names)
    photos, lost = [], []
    for row in rows:
        name = find(row.image)
        if name is None:
            lost.append(row.image)
            continue
        split = None
        if row.split is not None:
            split = canonical_split(row.split, f"{captions}:{row.line}")
        texts = [clean_caption(one) for one in row.captions]
        photos.append(Photo(name, [one for one in texts if one], split, file=folder / name))
    if not photos:
        raise InputError(
            f"none of the {len(rows)} rows of {captions} names an image in {folder} "
            f"({rows[0].image} first); is it the right folder?"
        )
    merged = merge(photos)
    without = sorted(set(names) - {photo.name for photo in merged})
    notes += _left_out(sorted(set(lost)), "images of the caption file are not in the folder")
    notes += _left_out(without, "images have no caption")
    return Source(merged, notes)


class _Finder:
    """Finds an image as a caption file names it: by path, by name alone, with or without ending."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)
        self.by_end: dict[str, list[str]] = {}
        for name in names:
            base = name.rsplit("/", 1)[-1]
            for key in {base, base.rsplit(".", 1)[0]}:
                self.by_end.setdefault(key, []).append(name)

    def __call__(self, image: str) -> str | None:
        plain = image.replace("\\", "/").strip().removeprefix("./")
        if plain in self.names:
            return plain
        found = self.by_end.get(plain.rsplit("/", 1)[-1], [])
        return found[0] if len(found) == 1 else None


def _left_out(names: list[str], told: str) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return [f"{len(names)} {told} and are left out ({shown})"]
