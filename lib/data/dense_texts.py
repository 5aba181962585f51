"""Files of dense texts: a JSON line each, matched with images by id, by file name or by order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError
from lib.files import parse_json, text_lines


def read_dense(path: Path, image_ids: list[str], names: list[str], way_out: str) -> list[str]:
    """Return one dense text an image, matched by `image_id`, else `file_name`, else by order."""
    records = dense_records(path, way_out)
    if any("image_id" in record for record in records):
        texts = _texts_by_key(records, "image_id", path)
        found = _matched_by_id(texts, image_ids, path)
    elif any("file_name" in record for record in records):
        texts = _texts_by_key(records, "file_name", path)
        found = [texts.get(name, texts.get(os.path.basename(name))) for name in names]
    else:
        return texts_in_order(records, path, len(image_ids))
    without = [one for one, text in zip(image_ids, found, strict=False) if text is None]
    if without or len(found) < len(image_ids):
        raise InputError(
            f"{path}: no dense text for {len(without) or len(image_ids)} of {len(image_ids)} "
            f"images (image ids {first_three(without or image_ids)}); {way_out}"
        )
    return [text for text in found if text is not None]  # all of them, as was seen


def dense_records(path: Path, way_out: str) -> list[dict]:
    """Return the records of a file of dense texts. Raises InputError naming file and line."""
    if not path.exists():
        raise InputError(f"the method needs dense texts, but there is no {path}; {way_out}")
    lines = text_lines(path, way_out)
    return [parse_dense(line, f"{path}:{n}") for n, line in enumerate(lines, start=1)]


def texts_in_order(records: list[dict], path: Path, images: int) -> list[str]:
    """Return the texts of as many records as images; InputError where the counts differ."""
    if len(records) != images:
        raise InputError(
            f"{path} has {len(records)} dense texts, but the split has {images} images; "
            "texts matched by order must follow the images one by one"
        )
    return [record["text"] for record in records]


def parse_dense(line: str, where: str) -> dict:
    """Return the record of a .jsonl line with a dense text; InputError naming `where` otherwise."""
    record = parse_json(line, where, "a JSON line")
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: the line needs a non-empty "text"')
    return record


def _texts_by_key(records: list[dict], key: str, path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line, record in enumerate(records, start=1):
        if key not in record:
            raise InputError(f'{path}:{line}: no "{key}", which other lines have')
        value = _key_text(record[key], key, f"{path}:{line}")
        if value in texts:
            raise InputError(f"{path}:{line}: {key} {value} has a dense text already")
        texts[value] = record["text"]
    return texts


def _key_text(value: object, key: str, where: str) -> str:
    """Return the value of a record's key as a mapping writes it: text, or a whole number's."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise InputError(f"{where}: {key} {value!r:.40} is neither a text nor a whole number")
    return str(value)


def _matched_by_id(texts: dict[str, str], image_ids: list[str], path: Path) -> list[str | None]:
    """Return each image's text by its id as it is written, else by its number: 12 is 000012."""
    found = [texts.get(one) for one in image_ids]
    if None not in found:
        return found
    written: dict[int, str] = {}
    for key in texts:
        number = _number(key)
        if number is not None and written.setdefault(number, key) != key:
            raise InputError(
                f"{path}: image_id {written[number]} and {key} are one number, and none of them is "
                "written as in the split's ids; write them as there"
            )
    return [texts.get(one, texts.get(written.get(_number(one), ""))) for one in image_ids]


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def first_three(items: Sequence[str]) -> str:
    """Return the first three of a list for a sentence."""
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
