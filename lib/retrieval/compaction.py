"""Giving back what superseded rows of an index take: those of changed and deleted pictures.

Live rows of the shards concerned are written into new shards first; the old ones go then, oldest
first. Whatever kills this leaves an index that holds the same pictures: of a row that is there
twice the later one counts, and an entry that says "gone" outlives the rows it speaks of.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lib.retrieval.index import SHARDS, Part, PictureIndex

DEAD_AT_MOST = 0.3  # share of the rows on disk; above it they are worth the writing
SHARD_PICTURES = 512  # of a shard that is written


def dead_share(index: PictureIndex) -> float:
    """Return the share of the rows on disk that count no more."""
    return 1 - len(index) / index.rows_on_disk if index.rows_on_disk else 0.0


def compact(index: PictureIndex, most: float = DEAD_AT_MOST) -> int | None:
    """Drop superseded rows where their share exceeds `most`; return how many.

    None where another process writes to the index: then nothing is done.
    """
    with _alone(index) as alone:
        if not alone:
            return None
        index.refresh()
        _clear(index)
        old = index.superseded_shards()
        if not old or dead_share(index) <= most:
            return 0
        before = index.rows_on_disk
        _write_anew(index, old)
        for shard in old:  # oldest first
            _remove(index.folder / SHARDS / shard)
        index.refresh()
        return before - index.rows_on_disk


@contextmanager
def _alone(index: PictureIndex) -> Iterator[bool]:
    """Hold the whole index where no process writes to it; yields whether that is so."""
    with open(index.writers_lock, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _write_anew(index: PictureIndex, shards: list[str]) -> None:
    """Write the live rows of some shards into new ones, in an order that holds on the disk too."""
    numbers = [index.shards.index(one) for one in shards]
    rows = np.flatnonzero(np.isin(index.shard_of, numbers))
    rows = rows[index.reading_order(rows)]
    # a shard keeps dense texts of all its rows or of none
    told = np.isin(index.shard_of[rows], [one for one in numbers if index.has_texts(one)])
    for part in (*_parts(rows[told]), *_parts(rows[~told])):
        pictures = [index.pictures[one] for one in part]
        kept = index.vectors_of(part), index.records(part), index.dense_texts(part)
        written = index.add_shard(Part(), pictures, *kept)
        _settle(written)


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), SHARD_PICTURES):
        yield rows[first : first + SHARD_PICTURES]


def _settle(shard: Path) -> None:
    """Wait until a shard lies on the disk, so that no power cut finds it and its source gone."""
    for path in (*shard.iterdir(), shard, shard.parent):
        handle = os.open(path, os.O_RDONLY)
        with suppress(OSError):  # some file systems sync no folders
            os.fsync(handle)
        os.close(handle)


def _remove(shard: Path) -> None:
    """Remove a shard: out of the index at once, then from the disk."""
    dead = shard.with_name(f".{shard.name}.dead")
    os.replace(shard, dead)
    shutil.rmtree(dead, ignore_errors=True)


def _clear(index: PictureIndex) -> None:
    """Remove what a killed compaction left on the disk."""
    for left in (index.folder / SHARDS).glob(".*.dead"):
        shutil.rmtree(left, ignore_errors=True)
