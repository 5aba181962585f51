"""Caption files of several kinds -> (image, caption, split) rows, columns guessed and said."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError
from lib.files import text_lines

IMAGE_COLUMNS = (
    "image file_name filename image_name image_path filepath file path img photo".split()
)
CAPTION_COLUMNS = "caption captions text sentence sentences comment raw description title".split()
SPLIT_COLUMNS = "split set partition subset".split()
ENDINGS = (".csv", ".tsv", ".txt", ".jsonl")
TOKEN_LINE = re.compile(r"^(?P<image>[^\t]+)#\d+\t(?P<caption>.*)$")  # Flickr8k.token.txt
MOST_BROKEN = 0.01  # share of rows without a caption that is left out and told, not refused


@dataclass(frozen=True)
class Row:
    """A line of a caption file: the image as it names it, captions, and its split or None."""

    line: int
    image: str
    captions: tuple[str, ...]
    split: str | None = None

    @property
    def complete(self) -> bool:
        """Whether there are both an image and a caption."""
        return bool(self.image) and any(one.strip() for one in self.captions)


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None is guessed, and a split column may be missing."""

    image: str | None = None
    caption: str | None = None
    split: str | None = None


def read_captions(path: Path, wanted: Columns) -> tuple[list[Row], list[str]]:
    """Return the rows of a .csv, .tsv, .jsonl or .txt file and notes on how it was read.

    A .txt file is Flickr8k.token.txt's kind (`name.jpg#0<tab>caption`) or a .csv by another name.
    Raises InputError with file and line for what can't be read.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"--captions {path}: give a file that ends in {', '.join(ENDINGS)}")
    lines = text_lines(path, "name the file of captions with --captions")
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty")
    if path.suffix.lower() == ".jsonl":
        rows, note = _from_jsonl(path, lines, wanted)
    elif TOKEN_LINE.match(lines[0]):
        rows, note = _from_token_lines(path, lines)
    else:
        rows, note = _from_table(path, lines, wanted)
    good = [row for row in rows if row.complete]
    notes = [note]
    if len(good) < len(rows):
        bad = next(row for row in rows if not row.complete)
        told = f"{len(rows) - len(good)} of {len(rows)} rows lack an image or a caption"
        if len(rows) - len(good) > max(1, MOST_BROKEN * len(rows)):
            raise InputError(f"{path}:{bad.line}: {told}, this one first; mend the file")
        notes.append(f"{told} and are left out (line {bad.line} first)")
    return good, notes


def pick_column(
    names: Sequence[str], known: Sequence[str], given: str | None, flag: str, where: str
) -> str | None:
    """Return the column that was given or is known, None where neither; InputError for a wrong one.

    Names agree whatever their case, outer spaces and the signs between words.
    """
    plain = {re.sub(r"[\s\-]+", "_", name.strip().lower()): name for name in names}
    if given is not None:
        found = plain.get(re.sub(r"[\s\-]+", "_", given.strip().lower()))
        if found is None:
            raise InputError(f"{where}: no column {given} (--{flag}), there are {', '.join(names)}")
        return found
    return next((plain[one] for one in known if one in plain), None)


def choose_columns(
    names: Sequence[str], wanted: Columns, where: str
) -> tuple[str, str, str | None]:
    """Return the image, caption and split columns; InputError, listing all, where unclear."""
    image = pick_column(names, IMAGE_COLUMNS, wanted.image, "image_column", where)
    caption = pick_column(names, CAPTION_COLUMNS, wanted.caption, "caption_column", where)
    split = pick_column(names, SPLIT_COLUMNS, wanted.split, "split_column", where)
    if image is None or caption is None:
        missing = "image" if image is None else "caption"
        raise InputError(
            f"{where}: which of the columns {', '.join(map(str.strip, names))} holds the {missing}"
            f"? Name it with --{missing}_column"
        )
    return image, caption, split


def _from_jsonl(path: Path, lines: list[str], wanted: Columns) -> tuple[list[Row], str]:
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not a JSON line ({error.msg})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        records.append((number, record))
    image, caption, split = choose_columns(list(records[0][1]), wanted, str(path))
    rows = [
        Row(number, str(one.get(image) or ""), _texts(one.get(caption)), _text(one.get(split)))
        for number, one in records
    ]
    return rows, _said(path, image, caption, split)


def _texts(value: object) -> tuple[str, ...]:
    """Return the captions of a cell: one text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return tuple(one for one in values if isinstance(one, str))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _from_token_lines(path: Path, lines: list[str]) -> tuple[list[Row], str]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = TOKEN_LINE.match(line)
        if found is None:
            raise InputError(f"{path}:{number}: not of the form name.jpg#0<tab>caption")
        rows.append(Row(number, found["image"].strip(), (found["caption"].strip(),)))
    return rows, f"{path.name}: lines of the form name#number<tab>caption"


def _from_table(path: Path, lines: list[str], wanted: Columns) -> tuple[list[Row], str]:
    delimiter = _delimiter(path, lines[0])
    cells = list(_cells(path, lines, delimiter))
    head = [one.strip() for one in cells[0][1]]
    columns: tuple[int | None, ...]
    if _is_data(head):
        if len(head) < 2:
            raise InputError(f"{path}:1: one column; an image and a caption are needed")
        head, body, columns = ["image", "caption"], cells, (0, 1, None)
        said = f"{path.name}: no header, so column 1 is the image and column 2 the caption"
    else:
        body = cells[1:]
        names = choose_columns(head, wanted, str(path))
        columns = tuple(None if name is None else head.index(name) for name in names)
        said = _said(path, *names)
    image, caption, split = columns
    rows = []
    for number, values in body:
        values = _rejoined(values, len(head), caption, delimiter)
        cell = dict(enumerate(value.strip() for value in values))
        told = None if split is None else (cell.get(split) or None)
        rows.append(Row(number, cell.get(image, ""), (cell.get(caption, ""),), told))
    return rows, said


def _delimiter(path: Path, first: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",\t|;", key=first.count)  # Flickr30K's results.csv has |


def _cells(path: Path, lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of a table; quotes are text where the delimiter is tab or |."""
    quoting = csv.QUOTE_NONE if delimiter in "\t|" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, quoting=quoting)
    number = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield number, [_unquoted(cell) for cell in cells]
            number = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: no table row ({error})") from None


def _unquoted(cell: str) -> str:
    """Return a cell without the quotes around it where all inside are doubled."""
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _is_data(head: Sequence[str]) -> bool:
    """Return whether a first row is an image and its caption already, not a header."""
    return bool(re.search(r"\.(jpe?g|png|webp|bmp|tiff?)$", head[0], flags=re.IGNORECASE))


def _rejoined(values: list[str], width: int, caption: int, delimiter: str) -> list[str]:
    """Return a row whose last column, the caption, was cut at delimiters of its own made whole."""
    if caption == width - 1 and len(values) > width:
        return [*values[:caption], delimiter.join(values[caption:])]
    return values


def _said(path: Path, image: str, caption: str, split: str | None) -> str:
    told = f"{path.name}: image is column '{image.strip()}', caption '{caption.strip()}'"
    return told if split is None else f"{told}, split '{split.strip()}'"
