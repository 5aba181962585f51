"""WebDataset shards: which tar files a pattern names, how much they hold, what a sample is."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.extras import need
from lib.errors import InputError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
TEXT_KEYS = ("txt", "caption", "captions", "text", "cap")
CAPTION_FIELDS = ("captions", "caption", "text", "sentences")
SIZES = "sizes.json"  # samples by file name, as the library's own tools write it


@dataclass(frozen=True)
class TarSample:
    """An image file's bytes and its texts; `key` is the shard's name, a slash, the sample's key.

    `fault` is a sentence on a sample that can't be used; then there is no image.
    """

    key: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    dense: str | None = None
    split: str | None = None
    fault: str | None = None


def expand_shards(pattern: str) -> list[str]:
    """Return the tar files, or URLs, that a brace pattern names; InputError where one is missing.

    http(s): and pipe: are read by the library and not looked for here.
    """
    braces = need("braceexpand", "webdataset", "reading shards")
    paths = list(braces.braceexpand(pattern))
    missing = [path for path in paths if not _remote(path) and not Path(path).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards of {pattern} are missing ({missing[0]} first)"
        )
    return paths


def _remote(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


def shard_name(path: str) -> str:
    """Return what keys of a shard's samples begin with: its file name without .tar."""
    return path.rsplit("/", 1)[-1].removesuffix(".tar")


def shard_sizes(paths: Sequence[str], sizes: Path | None = None) -> np.ndarray:
    """Return the samples of each shard, (shards,): from a sizes.json, else counted in the files.

    Raises InputError for a shard that is neither listed nor a local file that can be counted.
    """
    beside = sizes or Path(paths[0]).parent / SIZES
    listed = _listed(beside) if sizes or beside.is_file() else {}
    counts = []
    for path in paths:
        count = listed.get(path.rsplit("/", 1)[-1])
        counts.append(_count(path) if count is None else count)
    return np.array(counts, dtype=np.int64)


def _listed(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(count) for name, count in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} can't be read ({error}); it maps a shard's file name to its samples"
        ) from None


def _count(path: str) -> int:
    if _remote(path):
        raise InputError(
            f"how many samples {path} holds is not known: list the shards in a JSON file, "
            '{"' + path.rsplit("/", 1)[-1] + '": 10000, …}, and name it with --shard_sizes'
        )
    split_name = need("webdataset.tariterators", "webdataset", "reading shards").base_plus_ext
    try:
        with tarfile.open(path) as tar:
            keys = {split_name(one.name)[0] for one in tar if one.isfile()}
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path}: the shard is damaged or cut off ({error})") from None
    return len(keys - {None})


def read_samples(path: str) -> Iterator[TarSample]:
    """Yield the samples of one shard; InputError, naming it, where it is damaged.

    The tar file is read by the library; none of its splitting or shuffling takes part.
    """
    webdataset = need("webdataset", "webdataset", "reading shards")
    pipeline = webdataset.WebDataset(
        [path], shardshuffle=False, empty_check=False, nodesplitter=None, workersplitter=None
    )
    try:
        for raw in pipeline:
            try:
                sample = _sample(raw, path)
            except InputError as error:
                sample = TarSample(f"{shard_name(path)}/{raw['__key__']}", fault=str(error))
            yield sample
    except (
        Exception
    ) as error:  # tarfile's, gzip's and the library's own: a shard that can't be read
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: the shard is damaged or cut off ({told:.120})") from None


def _sample(raw: dict[str, Any], path: str) -> TarSample:
    where = f"{path}: sample {raw['__key__']}"
    image = next((raw[one] for one in IMAGE_KEYS if one in raw), None)
    if image is None:
        held = ", ".join(name for name in raw if name[0] != "_")
        raise InputError(f"{where} has no image, only {held}")
    told = _json(raw, where)
    dense = raw["dense"].decode("utf-8", "replace") if "dense" in raw else told.get("dense")
    split = told.get("split")
    return TarSample(
        key=f"{shard_name(path)}/{raw['__key__']}",  # keys may begin anew in each shard
        image=image,
        captions=_captions(raw, told, where),
        dense=dense if isinstance(dense, str) and dense.strip() else None,
        split=split if isinstance(split, str) and split else None,
    )


def _json(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if "json" not in raw:
        return {}
    try:
        found = json.loads(raw["json"])
    except ValueError as error:
        raise InputError(f"{where}: its json is not JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def _captions(raw: dict[str, Any], told: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the captions: lines of the text file, or a field of the json."""
    text = next((raw[one] for one in TEXT_KEYS if one in raw), None)
    try:
        found = text.decode("utf-8").split("\n") if isinstance(text, bytes) else []
    except UnicodeDecodeError:
        raise InputError(f"{where}: its caption is not UTF-8") from None
    if not found:
        value: Any = next((told[one] for one in CAPTION_FIELDS if told.get(one)), [])
        found = value if isinstance(value, list) else [value]
    return tuple(
        clean for one in found if isinstance(one, str) and (clean := " ".join(one.split()))
    )
