"""WebDataset shards -> samples; the library reads the tar files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.data.extras import need
from lib.data.prepare.extract import Journal, Sample, extract, safe_name
from lib.data.prepare.photos import Source, canonical_split, clean_caption
from lib.errors import InputError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
TEXT_KEYS = ("txt", "caption", "captions", "text", "cap")
CAPTION_FIELDS = ("captions", "caption", "text", "sentences")


def expand_shards(pattern: str) -> list[Path]:
    """Return the tar files that a brace pattern names; InputError where one is missing."""
    braces = need("braceexpand", "webdataset", "reading shards")
    paths = [Path(one) for one in braces.braceexpand(pattern)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards of {pattern} are missing ({missing[0]} first)"
        )
    return paths


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of one tar file; InputError, naming it, for one that is damaged."""
    webdataset = need("webdataset", "webdataset", "reading shards")
    pipeline = webdataset.WebDataset(
        [str(path)], shardshuffle=False, empty_check=False, nodesplitter=None
    )
    try:
        for raw in pipeline:
            yield _sample(raw, path)
    except InputError:
        raise
    except Exception as error:  # tarfile's, gzip's and the library's own: a shard that can't be read
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: the shard is damaged or cut off ({told:.120})") from None


def _sample(raw: dict[str, Any], path: Path) -> Sample:
    key = raw["__key__"]
    where = f"{path}: sample {key}"
    image = next((raw[one] for one in IMAGE_KEYS if one in raw), None)
    if image is None:
        raise InputError(f"{where} has no image, only {', '.join(k for k in raw if k[0] != '_')}")
    told = _json(raw, where)
    captions = _captions(raw, told, where)
    split = told.get("split")
    return Sample(
        key=f"{path.stem}/{key}",  # keys may begin anew in each shard
        name=safe_name(f"{path.stem}/{key}", image, where),
        captions=captions,
        split=canonical_split(split, where) if isinstance(split, str) and split else None,
        data=image,
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
        value = next((told[one] for one in CAPTION_FIELDS if told.get(one)), [])
        found = value if isinstance(value, list) else [value]
    return tuple(clean for one in found if isinstance(one, str) and (clean := clean_caption(one)))


def extract_shards(
    pattern: str, images: Path, journal: Journal, progress: Callable[[int], None]
) -> Source:
    """Write the images of all shards into `images`; return the photos.

    A shard that the journal has closed is not opened again.
    """
    paths = expand_shards(pattern)
    for path in paths:
        if str(path) not in journal.parts:
            extract(read_shard(path), images, journal, progress)
            journal.close_part(str(path))
    photos = list(journal.photos.values())
    return Source(photos, [f"{len(photos)} samples in {len(paths)} shards"])
