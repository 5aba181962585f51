"""WebDataset shards -> photos whose images lie in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lib.data.prepare.extract import Journal, Sample, extract, safe_name
from lib.data.prepare.photos import Source, canonical_split
from lib.data.tars import expand_shards, read_samples
from lib.errors import InputError


def extract_shards(
    pattern: str, images: Path, journal: Journal, progress: Callable[[int], None]
) -> Source:
    """Write the images of all shards into `images`; return the photos.

    A shard that the journal has closed is not opened again. Raises InputError for a shard that is
    missing or damaged.
    """
    paths = expand_shards(pattern)
    for path in paths:
        if path not in journal.parts:
            extract(_samples(path), images, journal, progress)
            journal.close_part(path)
    photos = list(journal.photos.values())
    return Source(photos, [f"{len(photos)} samples in {len(paths)} shards"])


def _samples(path: str) -> Iterator[Sample]:
    for one in read_samples(path):
        where = f"{path}: sample {one.key}"
        if one.fault is not None:
            raise InputError(one.fault)
        yield Sample(
            key=one.key,
            name=safe_name(one.key, one.image, where),
            captions=one.captions,
            split=None if one.split is None else canonical_split(one.split, where),
            data=one.image,
        )
