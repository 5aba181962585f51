"""The files of dense texts: appended line by line, mended after a kill, parts put together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lib.data.describe.outcomes import Task
from lib.errors import InputError
from lib.files import write_text_whole


class TextFile:
    """One file of texts that this process alone appends to, and its list of failures.

    Opening it cuts off a last line that a killed process left unfinished. Each text is on disk
    before the next is asked for. Raises InputError where another process holds the file, or where
    it can't be gone on with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = path.with_name(f"{path.stem}.failed.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115, held until close
        _lock(self._file, path)
        _cut_unfinished(self._file)
        self._failures: IO[str] | None = None

    def __enter__(self) -> TextFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start_failures(self) -> None:
        """Begin the list of failures anew: all that it names are tried again now."""
        self.failed.unlink(missing_ok=True)

    def add(self, record: dict[str, Any]) -> None:
        """Append a line and see it to the disk."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._file.write(line.encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def fail(self, task: Task, reason: str) -> None:
        """Append a failure to the list."""
        if self._failures is None:
            self._failures = open(self.failed, "a", encoding="utf-8")  # noqa: SIM115
        record = {"image_id": task.image_id, "file_name": task.name, "reason": reason}
        self._failures.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._failures.flush()

    def close(self) -> None:
        """Let go of the files; one without a text or failure is removed."""
        if self._failures is not None:
            self._failures.close()
        empty = os.fstat(self._file.fileno()).st_size == 0
        if empty and self.path.exists():
            self.path.unlink()
        self._file.close()


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl  # POSIX only; elsewhere nothing guards against a second process
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(
            f"{path} is being written by another tools.describe: wait for it to end, or share the "
            "work with --part 1/2 and --part 2/2"
        ) from None


def _cut_unfinished(file: IO[bytes]) -> None:
    """Drop what stands behind the last newline."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            file.truncate(start + found + 1)
            return
        end = start
    if size:
        file.truncate(0)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of texts; InputError with the line for one that is none."""
    if not path.exists():
        return []
    records = []
    raw = path.read_bytes()
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"{path}:{number}: not a JSON line with a text; mend or remove the line"
            )
        records.append(record)
    return records


def described(path: Path, tasks: Sequence[Task]) -> set[str]:
    """Return the ids of images that a file has a text for, by image_id or by file name.

    Raises InputError for lines without either, which are matched by order: such a file is whole or
    can't be gone on with.
    """
    by_name = {task.name: task.image_id for task in tasks}
    by_name |= {task.name.rsplit("/", 1)[-1]: task.image_id for task in tasks}
    done: set[str] = set()
    records = read_records(path)
    if records and all("image_id" not in one and "file_name" not in one for one in records):
        if len(records) == len(tasks):
            return {task.image_id for task in tasks}
        raise InputError(
            f"{path} has {len(records)} texts for {len(tasks)} images, and its lines don't say of "
            "which: they can't be added to; move the file away"
        )
    for record in records:
        if "image_id" in record:
            done.add(str(record["image_id"]))
        elif record.get("file_name") in by_name:
            done.add(by_name[record["file_name"]])
    return done


def part_file(path: Path, number: int, count: int) -> Path:
    """Return the file of one machine's share."""
    return path.with_name(f"{path.stem}.part-{number}-of-{count}.jsonl")


def part_files(path: Path) -> list[Path]:
    """Return the files of shares that are there, of any number of machines."""
    pattern = re.compile(re.escape(path.stem) + r"\.part-\d+-of-\d+\.jsonl")
    return sorted(one for one in path.parent.glob("*.jsonl") if pattern.fullmatch(one.name))


def put_together(path: Path, tasks: Sequence[Task]) -> bool:
    """Write one file from the parts once they cover all images; return whether they do.

    Lines come in the order of the images, one each; the parts are removed then.
    """
    parts = part_files(path)
    if not parts:
        return False
    records: dict[str, dict[str, Any]] = {}
    for one in [path, *parts]:
        for record in read_records(one):
            records.setdefault(str(record.get("image_id")), record)
    if any(task.image_id not in records for task in tasks):
        return False
    lines = [json.dumps(records[task.image_id], ensure_ascii=False) for task in tasks]
    write_text_whole(path, "".join(f"{line}\n" for line in lines))
    for one in parts:
        one.unlink(missing_ok=True)
    return True
