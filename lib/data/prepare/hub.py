"""A Hugging Face data set, from the hub or a local folder -> photos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.data.extras import need
from lib.data.prepare.captions import (
    CAPTION_COLUMNS,
    SPLIT_COLUMNS,
    Columns,
    pick_column,
)
from lib.data.prepare.extract import Journal, Sample, extract, image_ending, safe_name
from lib.data.prepare.photos import Source, canonical_split, clean_caption, merge
from lib.errors import InputError

FILE_COLUMNS = "file_name filename image_name img_id image_id id".split()


def extract_hub(
    name: str,
    config: str | None,
    wanted: Columns,
    images: Path,
    journal: Journal,
    progress: Callable[[int], None],
) -> Source:
    """Write the images of a data set into `images`, bytes unchanged; return the photos.

    `name` is a hub id, a folder of `save_to_disk` or one that `load_dataset` reads (imagefolder,
    parquet). A split column goes before the data set's own splits; the latter only count where
    there are several. Rows with the very same image are one photo.
    """
    tables = load_tables(name, config)
    first = next(iter(tables.values()))
    image, caption, split, file = _columns(first, wanted, f"hf {name}")
    told = f"{name}: image is column '{image}', caption '{caption}'"
    notes = [told + (f", split '{split}'" if split else "")]
    own_splits = split is None and len(tables) > 1
    for part, table in tables.items():
        if part in journal.parts:
            continue
        samples = _samples(part, table, (image, caption, split, file), own_splits, name, journal)
        extract(samples, images, journal, progress)
        journal.close_part(part)
    if own_splits:
        notes.append(f"splits as the data set has them: {', '.join(tables)}")
    return Source(merge(journal.photos.values()), notes)


def load_tables(name: str, config: str | None = None) -> dict[str, Any]:
    """Return the tables of a data set by split. Raises InputError where it can't be loaded."""
    datasets = need("datasets", "datasets", "reading Hugging Face data sets")
    folder = Path(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
    except Exception as error:  # the library raises dozens of kinds, its own and pyarrow's
        told = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"hf {name}: neither a local folder that datasets reads nor a data set that the hub "
            f"hands out here ({told:.200})"
        ) from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _columns(table: Any, wanted: Columns, where: str) -> tuple[str, str, str | None, str | None]:
    """Return the image, caption, split and file name columns."""
    datasets = need("datasets", "datasets", "reading Hugging Face data sets")
    names = list(table.features)
    typed = [one for one in names if isinstance(table.features[one], datasets.Image)]
    image = pick_column(names, typed[:1], wanted.image, "image_column", where)
    caption = pick_column(names, CAPTION_COLUMNS, wanted.caption, "caption_column", where)
    image, caption = (
        _known(found, what, names, where)
        for what, found in (("image", image), ("caption", caption))
    )
    split = pick_column(names, SPLIT_COLUMNS, wanted.split, "split_column", where)
    file = pick_column([one for one in names if one != image], FILE_COLUMNS, None, "", where)
    return image, caption, split, file


def _known(column: str | None, what: str, names: list[str], where: str) -> str:
    if column is None:
        raise InputError(
            f"{where}: which of the columns {', '.join(names)} holds the {what}? "
            f"Name it with --{what}_column"
        )
    return column


def _samples(
    part: str,
    table: Any,
    columns: tuple[str, str, str | None, str | None],
    own_splits: bool,
    name: str,
    journal: Journal,
) -> Iterator[Sample]:
    datasets = need("datasets", "datasets", "reading Hugging Face data sets")
    image, caption, split, file = columns
    table = table.cast_column(image, datasets.Image(decode=False))
    table = table.select_columns([one for one in columns if one is not None])
    done = len([key for key in journal.photos if key.startswith(f"{part}/")])
    for number in range(done, len(table)):
        row, where = table[number], f"hf {name}, {part} row {number}"
        told = part if own_splits else (row[split] if split else None)
        data, path = _image(row[image], where)
        yield Sample(
            key=f"{part}/{number}",
            name=_file_name(row.get(file) if file else None, path, data, where),
            captions=_captions(row[caption], where),
            split=canonical_split(str(told), where) if told else None,
            data=data,
            file=path if data is None else None,
        )


def _image(value: Any, where: str) -> tuple[bytes | None, Path | None]:
    """Return an image's bytes, or the file where it lies; InputError where there is neither."""
    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data is None and (path is None or not Path(path).is_file()):
        raise InputError(f"{where}: there is no image")
    return data, Path(path) if path else None


def _file_name(told: Any, path: Path | None, data: bytes | None, where: str) -> str:
    """Return the name of an image's file: as the data set tells, else by its content."""
    base = str(told) if told not in (None, "") else (path.name if path else "")
    if not base:
        base = hashlib.sha256(data or b"").hexdigest()[:20]
    if data is None and path is not None:
        return safe_name(base, None, where, path.suffix.lower())
    suffix = Path(base).suffix.lower()
    known = suffix if suffix in (".jpg", ".jpeg", ".png", ".webp") else None
    return safe_name(base, data, where, known or image_ending(data or b""))


def _captions(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise InputError(f"{where}: the caption is no text: {value!r:.60}")
    return tuple(clean for one in values if (clean := clean_caption(one)))
