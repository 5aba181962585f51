"""What a split's data is, in a few numbers: kept with a run, so that other data is noticed."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from lib.data.shards import ShardSet
from lib.data.splits import Split
from lib.data.tars import shard_name
from lib.distributed import gather_values
from lib.errors import InputError

COUNTS = ("images", "captions")


def split_fingerprint(split: Split | ShardSet) -> dict[str, Any]:
    """Return plain values that two splits share only where texts, ids and their order are the same.

    Counts of images and captions, and SHA-256 digests: of the captions, of each caption's image id,
    and of the dense texts where they are read. The pixels are not read. Of shards, which are read
    in passing, names and sizes stand for all that.
    """
    if isinstance(split, ShardSet):
        return _shards_fingerprint(split)
    of_captions = (split.image_ids[row] for row in split.caption_image.tolist())
    return {
        "dataset": split.dataset,
        "split": split.name,
        "images": len(split.image_ids),
        "captions": len(split.captions),
        "captions_sha256": _digest(split.captions),
        "ids_sha256": _digest(of_captions),
        "dense_sha256": None if split.dense is None else _digest(split.dense),
    }


def _shards_fingerprint(shards: ShardSet) -> dict[str, Any]:
    images = int(shards.sizes.sum())
    pairs = zip(shards.paths, shards.sizes.tolist(), strict=True)
    digest = _digest(f"{shard_name(path)} {size}" for path, size in pairs)
    return {
        "dataset": "shards",
        "split": "train",
        "images": images,
        "captions": images,
        "captions_sha256": digest,
        "ids_sha256": digest,
        "dense_sha256": None,
    }


def fingerprint_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs, each as words for a sentence; empty where nothing does.

    Where one side has no digest of dense texts, as they were not read, none is compared.
    """
    found = []
    for key in ("dataset", "split"):
        if then.get(key) != now.get(key):
            found.append(f"{key} {now.get(key)} (was {then.get(key)})")
    counts = [key for key in COUNTS if then.get(key) != now.get(key)]
    found += [f"{now.get(key)} {key} (was {then.get(key)})" for key in counts]
    digests = {"captions_sha256": "the captions' words or order", "ids_sha256": "the image ids"}
    if "captions" not in counts:  # else the digests say nothing new
        found += [told for key, told in digests.items() if then.get(key) != now.get(key)]
    dense = then.get("dense_sha256"), now.get("dense_sha256")
    if None not in dense and dense[0] != dense[1]:
        found.append("the dense texts")
    return found


def check_same_files(fingerprint: Mapping[str, Any]) -> None:
    """Raise InputError, on every rank, where a rank's data is not rank 0's: nodes may have copies.

    Every rank calls it with the fingerprint of what it read.
    """
    found = gather_values((socket.gethostname(), fingerprint))
    for source, (host, one) in enumerate(found):
        differing = fingerprint_differences(found[0][1], one)
        if differing:
            raise InputError(
                f"rank {source} on {host} reads other data than rank 0 on {found[0][0]}: "
                f"{', '.join(differing)}; give every node the same files"
            )


def files_fingerprint(paths: Iterable[str | os.PathLike], anywhere: bool = False) -> dict[str, Any]:
    """Return how many files there are and a SHA-256 of their paths, sizes and times of change.

    Of names and sizes alone with `anywhere`: machines may have copies of their own. The contents
    are not read; a file that is not there counts as such.
    """
    lines = []
    for path in paths:
        try:
            found = os.stat(path)
            name, time = path, f" {found.st_mtime_ns}"
            if anywhere:
                name, time = os.path.basename(path), ""
            lines.append(f"{name} {found.st_size}{time}")
        except OSError:
            lines.append(f"{path} missing")
    return {"files": len(lines), "sha256": _digest(lines)}


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()
