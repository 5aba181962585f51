"""Samples that carry their image's bytes (shards, Hugging Face) -> image files, resumable.

Each sample goes into a journal once its image is on disk: a run that was killed goes on behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.data.prepare.photos import Photo
from lib.errors import InputError
from lib.files import write_bytes_whole


@dataclass(frozen=True)
class Sample:
    """An image with its bytes, or the path of its file, and what is known of it."""

    key: str  # unique in the source
    name: str  # of the file to be
    captions: tuple[str, ...]
    split: str | None = None
    data: bytes | None = None
    file: Path | None = None


class Journal:
    """Samples that are on disk already, by key; `parts` are shards that are done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.photos: dict[str, Photo] = {}
        self.parts: set[str] = set()
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a killed run may have cut the last line off
        if len(whole) < len(text):
            self.path.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            entry = json.loads(line)
            if "part" in entry:
                self.parts.add(entry["part"])
            else:
                file = entry.get("file")
                self.photos[entry["key"]] = Photo(
                    entry["name"],
                    entry["captions"],
                    entry["split"],
                    file=Path(file) if file else None,
                )

    def add(self, sample: Sample) -> None:
        """Note a sample whose image is on disk."""
        file = None if sample.file is None else str(sample.file)
        entry = {"key": sample.key, "name": sample.name, "split": sample.split, "file": file}
        self._append({**entry, "captions": list(sample.captions)})
        self.photos[sample.key] = Photo(
            sample.name, list(sample.captions), sample.split, file=sample.file
        )

    def close_part(self, part: str) -> None:
        """Note that a whole shard is done."""
        self._append({"part": part})
        self.parts.add(part)

    def _append(self, entry: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def extract(
    samples: Iterable[Sample], images: Path, journal: Journal, progress: Callable[[int], None]
) -> None:
    """Write the images of samples that the journal lacks into `images`, and note them in it."""
    for sample in samples:
        if sample.key not in journal.photos:
            if sample.data is not None:
                path = images / sample.name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_whole(path, sample.data)
            journal.add(sample)
        progress(1)


def safe_name(key: str, data: bytes | None, where: str, ending: str | None = None) -> str:
    """Return a file name for a sample that stays inside the image folder.

    The ending is `ending`, else the one that the image's first bytes tell; InputError for none.
    """
    parts = [re.sub(r"[^\w.\-]", "_", part) for part in key.replace("\\", "/").split("/")]
    plain = "/".join(part for part in parts if part.strip("."))
    ending = ending or (image_ending(data) if data else None)
    if not plain or not ending:
        raise InputError(f"{where}: the image of {key!r} is of no known kind (JPEG, PNG, WebP)")
    return plain if plain.lower().endswith(ending) else plain + ending


def image_ending(data: bytes) -> str | None:
    """Return .jpg, .png, .webp, .bmp or .tif by an image file's first bytes, None for others."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    marks = {
        b"\xff\xd8": ".jpg",
        b"\x89PNG": ".png",
        b"BM": ".bmp",
        b"II*\x00": ".tif",
        b"MM\x00*": ".tif",
    }
    return next((ending for mark, ending in marks.items() if data.startswith(mark)), None)
