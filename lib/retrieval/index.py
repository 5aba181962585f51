"""An index of pictures on disk: a manifest, and shards that are written whole and never changed.

A shard is a folder: `entries.jsonl` (a line a picture: path, size, time, fingerprint),
`vectors.npy` (its global vectors, float32) and `records.npy` (what the method keeps of it). Of two
entries of one path the one in the later shard counts; an entry that is `gone` takes it out. So a
picture that changes is added anew, several processes may write at once, each its own part of the
paths, and whatever kills one leaves whole shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.files import read_json, write_json
from lib.retrieval.records import RecordFile, joined
from lib.retrieval.shard_texts import NAME as TEXTS
from lib.retrieval.shard_texts import read_texts, write_texts

MANIFEST, SHARDS = "manifest.json", "shards"
FORMAT, VERSION = "picture-index", 1
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
SHARD_NAME = re.compile(r"(\d{6})-part(\d+)of(\d+)")
SETTINGS = ("checkpoint_sha256", "method", "dense_side", "img_res", "store", "dimension")
OPEN_FILES = 256  # shards mapped at once


@dataclass(frozen=True)
class Picture:
    """A picture of the index: where it lies in the pictures' folder, and what it was when read."""

    path: str
    size: int = 0
    mtime_ns: int = 0
    sha256: str = ""
    gone: bool = False


@dataclass(frozen=True)
class Part:
    """The share of an index that one process works on: `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    def owns(self, path: str) -> bool:
        """Return whether a picture is this part's: a matter of its path alone."""
        return zlib.crc32(path.encode()) % self.count == self.number - 1

    @property
    def name(self) -> str:
        return f"part{self.number}of{self.count}"


def entry_line(picture: Picture) -> str:
    """Return the line of a picture in a shard's entries.jsonl."""
    return json.dumps(asdict(picture)) + "\n"


def find_pictures(folder: Path) -> dict[str, os.stat_result]:
    """Return every picture file under `folder` by its path in it; hidden ones are left out."""
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or Path(name).suffix.lower() not in PICTURES:
                continue
            path = Path(root, name)
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat()
    return found


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What an index needs to agree with its folder again."""

    to_read: list[str]  # new pictures and changed ones
    gone: list[str]
    unchanged: int
    new: int


class PictureIndex:
    """The index in a folder, as it is now; call `refresh` to see what other processes added."""

    def __init__(self, folder: str | Path, manifest: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self._open: dict[str, RecordFile] = {}
        self.refresh()

    @classmethod
    def open(cls, folder: str | Path) -> PictureIndex:
        """Return an index that is there. Raises InputError where there is none."""
        manifest = read_json(Path(folder) / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{folder} is no index (no {MANIFEST}): make one with python -m tools.search "
                f"index FOLDER --checkpoint C --out {folder}"
            )
        if manifest.get("version", 0) > VERSION:
            raise InputError(
                f"{folder} was written by a later version of this program: update it, or index anew"
            )
        return cls(folder, manifest)

    @classmethod
    def create(cls, folder: str | Path, manifest: dict[str, Any]) -> PictureIndex:
        """Return the index in `folder`, begun where there is none.

        Raises InputError where the one that is there was made with other settings, or the folder
        holds something else.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            index = cls.open(folder)
            index.check(manifest)
            return index
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--out {folder} is there and is no index: name a new folder")
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **manifest})
        return cls.open(folder)

    def check(self, manifest: dict[str, Any]) -> None:
        """Raise InputError where a checkpoint or setting is not the one that made this index."""
        for name in (*SETTINGS, "folder"):
            if name in manifest and manifest[name] != self.manifest.get(name):
                old, new = self.manifest.get(name), manifest[name]
                if name == "checkpoint_sha256":
                    old = f"{self.manifest.get('checkpoint')} ({str(old)[:12]}…)"
                    new = f"{manifest.get('checkpoint')} ({new[:12]}…)"
                raise InputError(
                    f"{self.folder} was made with {name.removesuffix('_sha256')} {old}, not {new}: "
                    "give that one, or name another folder with --out"
                )

    # --- what is there -----------------------------------------------------------------------

    def refresh(self) -> None:
        """Read which shards there are, and which of their rows count."""
        pattern = sorted((self.folder / SHARDS).glob("*-part*of*"))
        self.shards = [path.name for path in pattern if SHARD_NAME.fullmatch(path.name)]
        for removed in self._open.keys() - set(self.shards):
            self._open.pop(removed).close()
        places: dict[str, tuple[Picture, int, int]] = {}
        self._entries_of = np.zeros(len(self.shards), dtype=np.int64)
        self.rows_on_disk = 0
        for number, shard in enumerate(self.shards):
            for row, picture in enumerate(self._entries(shard)):
                self._entries_of[number] += 1
                self.rows_on_disk += not picture.gone
                if picture.gone:
                    places.pop(picture.path, None)
                else:
                    places[picture.path] = (picture, number, row)
        self.pictures = [picture for picture, _, _ in places.values()]
        self.shard_of = np.array([number for _, number, _ in places.values()], dtype=np.int64)
        self.row_of = np.array([row for _, _, row in places.values()], dtype=np.int64)
        self.__dict__.pop("vectors", None)

    def _entries(self, shard: str) -> Iterator[Picture]:
        path = self.folder / SHARDS / shard / "entries.jsonl"
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                yield Picture(**json.loads(line))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} can't be read ({error}); remove its folder and index again"
            ) from None

    def __len__(self) -> int:
        """Number of pictures that can be found."""
        return len(self.pictures)

    @property
    def picture_folder(self) -> Path:
        """The folder that the pictures lie in."""
        return Path(self.manifest["folder"])

    def file(self, picture: int) -> Path:
        """Return the file of a picture by its number. Raises InputError where it leaves the folder.

        Only what the index lists is ever named, whatever a request asks for.
        """
        relative = Path(self.pictures[picture].path)
        if relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"{relative} lies outside {self.picture_folder}")
        return self.picture_folder / relative

    @cached_property
    def vectors(self) -> np.ndarray:
        """The global vectors of all pictures, (N, D) float32."""
        return self.vectors_of(np.arange(len(self)))

    def vectors_of(self, pictures: np.ndarray) -> np.ndarray:
        """Return the global vectors of some pictures, (P, D) float32, read from disk."""
        found = np.empty((len(pictures), int(self.manifest["dimension"])), dtype=np.float32)
        numbers = self.shard_of[pictures]
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            path = self.folder / SHARDS / self.shards[number] / "vectors.npy"
            try:
                found[mine] = np.load(path)[self.row_of[pictures[mine]]]
            except (OSError, ValueError, IndexError) as error:
                raise InputError(
                    f"{path} can't be read ({error}); remove its folder and index again"
                ) from None
        return found

    def records(self, pictures: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the records of some pictures, in that order."""
        pictures = np.asarray(pictures, dtype=np.int64)
        numbers = self.shard_of[pictures]
        parts, places = [], []
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            parts.append(self._file(self.shards[number]).take(self.row_of[pictures[mine]]))
            places.append(mine)
        if len(parts) == 1:
            return parts[0]
        if any(part.dtype != parts[0].dtype for part in parts):
            return joined(parts)[np.argsort(np.concatenate(places))]
        whole = np.empty(len(pictures), dtype=parts[0].dtype)  # one copy, not three
        for part, mine in zip(parts, places, strict=True):
            whole[mine] = part
        return whole

    def dense_texts(self, pictures: np.ndarray) -> list[str] | None:
        """Return the dense texts that some pictures were read with; None where they had none."""
        numbers, found = self.shard_of[pictures], [""] * len(pictures)
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            rows = self.row_of[pictures[mine]].tolist()
            texts = read_texts(self.folder / SHARDS / self.shards[number], rows)
            if texts is None:
                return None
            for place, text in zip(mine, texts, strict=True):
                found[place] = text
        return found

    def has_texts(self, shard: int) -> bool:
        """Return whether a shard, by its number, keeps dense texts."""
        return (self.folder / SHARDS / self.shards[shard] / TEXTS).exists()

    def reading_order(self, pictures: np.ndarray) -> np.ndarray:
        """Return the places in `pictures` in the order in which their records lie on disk."""
        return np.lexsort((self.row_of[pictures], self.shard_of[pictures]))

    def prefetch(self, pictures: np.ndarray) -> None:
        """Have the system read the records of some pictures, all at once, while others are used."""
        numbers = self.shard_of[pictures]
        for number in np.unique(numbers):
            self._file(self.shards[number]).prefetch(self.row_of[pictures[numbers == number]])

    def _file(self, shard: str) -> RecordFile:
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = RecordFile(self.folder / SHARDS / shard / "records.npy")
        return self._open[shard]

    def superseded_shards(self) -> list[str]:
        """Return the shards that hold an entry which no picture needs any more, oldest first."""
        live = np.bincount(self.shard_of, minlength=len(self.shards))
        return [self.shards[one] for one in np.flatnonzero(live < self._entries_of)]

    @property
    def state(self) -> str:
        """A digest of which shards count: it changes when a picture comes, goes or changes."""
        return hashlib.sha256("\n".join(self.shards).encode()).hexdigest()

    # --- what changes ------------------------------------------------------------------------

    def plan(self, found: dict[str, os.stat_result], part: Part) -> Plan:
        """Return what must be read or dropped of this part's share of the files `found`.

        A file of another time but the same content counts as unchanged.
        """
        known = {one.path: one for one in self.pictures if part.owns(one.path)}
        mine = {path: stat for path, stat in found.items() if part.owns(path)}
        to_read = [
            path for path, stat in mine.items() if self._differs(known.get(path), path, stat)
        ]
        gone = [path for path in known if path not in mine]
        new = sum(path not in known for path in to_read)
        return Plan(to_read, gone, len(mine) - len(to_read), new)

    def _differs(self, known: Picture | None, path: str, stat: os.stat_result) -> bool:
        if known is None or known.size != stat.st_size:
            return True
        if known.mtime_ns == stat.st_mtime_ns:
            return False
        return fingerprint(self.picture_folder / path) != known.sha256

    def add_shard(
        self,
        part: Part,
        pictures: Sequence[Picture],
        vectors: np.ndarray,
        records: np.ndarray,
        dense: Sequence[str] | None = None,
    ) -> Path:
        """Write a shard, whole or not at all; entries that are gone come last, without rows.

        `dense` are the rows' dense texts. Return its folder.
        """
        shards = self.folder / SHARDS
        shards.mkdir(exist_ok=True)
        # a shard that is here already or is being written: a later one must sort behind it
        numbers = [int(path.name[:6]) for path in shards.glob("[0-9]*-part*of*")]
        name = f"{max(numbers, default=0) + 1:06d}-{part.name}"
        temporary = shards / f".{name}.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            lines = "".join(map(entry_line, pictures))
            (temporary / "entries.jsonl").write_text(lines, encoding="utf-8")
            if len(vectors):
                np.save(temporary / "vectors.npy", vectors.astype(np.float32))
                np.save(temporary / "records.npy", records)
            if dense is not None:
                write_texts(temporary, dense)
            os.replace(temporary, shards / name)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return shards / name

    @property
    def writers_lock(self) -> Path:
        """The file that every writer holds, and a compaction holds alone."""
        return self.folder / ".writers.lock"

    @contextmanager
    def writing(self, part: Part) -> Iterator[None]:
        """Hold this part of the index; raises InputError where another process does."""
        with (
            open(self.folder / f".{part.name}.lock", "w") as lock,
            open(self.writers_lock, "w") as shared,
        ):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"another process is indexing {part.number}/{part.count} of {self.folder}: "
                    "wait for it, or give each process its own --part i/n"
                ) from None
            fcntl.flock(shared, fcntl.LOCK_SH)  # waits for a compaction
            for left in (self.folder / SHARDS).glob(f".*-{part.name}.writing"):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            yield


def merge_indices(sources: Sequence[PictureIndex], out: str | Path) -> PictureIndex:
    """Return the index of all sources' shards, copied; theirs stay.

    For parts written on machines without a common disk. Raises InputError where they were made
    with different checkpoints, settings or folders of pictures.
    """
    first = sources[0]
    plain = {k: v for k, v in first.manifest.items() if k not in ("format", "version")}
    merged = PictureIndex.create(out, plain)
    for source in sources:
        merged.check({name: source.manifest.get(name) for name in (*SETTINGS, "checkpoint")})
        for shard in source.shards:
            target = merged.folder / SHARDS / shard
            if target.exists():
                raise InputError(
                    f"{source.folder} and another index both have {shard}: index with --part i/n, "
                    "each part once"
                )
            temporary = target.with_name(f".{shard}.writing")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(source.folder / SHARDS / shard, temporary)
            os.replace(temporary, target)
    merged.refresh()
    return merged
