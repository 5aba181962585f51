"""Files from outside, read with one sentence for whatever is wrong with them; files of a run."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from lib.errors import InputError

LFS_POINTER = b"version https://git-lfs"  # what such a file begins with
LFS_WAY_OUT = "a Git LFS pointer, not the file itself: fetch it with git lfs pull"


def read_bytes(path: str | os.PathLike, hint: str = "") -> bytes:
    """Return what a file holds. Raises InputError as `check_file` does."""
    check_file(path, hint)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None


def read_text(path: str | os.PathLike, hint: str = "") -> str:
    """Return a UTF-8 file without its byte order mark. Raises InputError naming file and line."""
    raw = read_bytes(path, hint)
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; convert the file to UTF-8") from None


def split_lines(text: str) -> list[str]:
    """Return the lines, split at newlines alone (a caption may hold other Unicode separators)."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def text_lines(path: str | os.PathLike, hint: str) -> list[str]:
    """Return the lines of a UTF-8 file; InputError, with the hint, where it can't be read."""
    return split_lines(read_text(path, hint))


def parse_json(text: str, where: str, kind: str = "JSON") -> Any:
    """Return what JSON text holds. Raises InputError naming `where` and, below line 1, the line.

    `kind` is what the sentence says that the text is not.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if error.lineno > 1 else ""
        raise InputError(f"{where}{line}: not {kind} ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply to be read") from None
    except ValueError as error:  # numbers of thousands of digits
        raise InputError(f"{where}: not {kind} that can be read ({error})") from None


def load_json(path: str | os.PathLike, hint: str = "") -> Any:
    """Return what a JSON file holds. Raises InputError naming the file and what is wrong."""
    return parse_json(read_text(path, hint), str(path))


def load_object(path: str | os.PathLike, hint: str = "") -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises InputError where it holds anything else."""
    found = load_json(path, hint)
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON {type(found).__name__} where an object is meant")
    return found


def check_file(path: str | os.PathLike, hint: str = "") -> None:
    """Raise InputError, with the hint, where `path` is no file whose content can be meant.

    That is: missing, a folder, unreadable, or a Git LFS pointer in the file's place.
    """
    tail = f"; {hint}" if hint else ""
    try:
        if os.path.isdir(path):
            raise InputError(f"{path}: a folder, where a file is meant{tail}")
        with open(path, "rb") as file:
            head = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise InputError(f"no file {path}{tail}" if hint else f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise InputError(f"{path} can't be read ({_reason(error)}){tail}") from None
    if head == LFS_POINTER:
        raise InputError(f"{path}: {LFS_WAY_OUT}")


def check_folder(path: str | os.PathLike[str], flag: str, weights: bool = False) -> None:
    """Raise InputError where `path`, the value of `flag`, is no folder.

    `weights` looks at each file of the folder besides: none may be a Git LFS pointer.
    """
    if os.path.isfile(path):
        raise InputError(f"{flag} {path}: a file, where a folder is meant; name its folder")
    if not os.path.isdir(path):
        raise InputError(f"{flag} {path}: no such folder")
    for entry in sorted(os.scandir(os.fspath(path)), key=lambda one: one.name) if weights else ():
        if entry.is_file():
            check_file(entry.path)


def check_destination(path: str | os.PathLike, flag: str, make_folder: bool = False) -> None:
    """Raise InputError where a file could not be written at `path`.

    Called before the work whose result goes there, so that the work is not lost. `make_folder` has
    its folder made where there is none.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise InputError(f"{flag} {path}: a folder; name a file")
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        elif not target.parent.is_dir():
            raise InputError(f"{flag} {path}: give a file in a folder that exists")
        probe = temporary_beside(target)
        probe.touch()
        probe.unlink()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise InputError(f"{flag} {path}: can't be written ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


# --- what a run writes for itself ----------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where it is missing or anything is wrong with it."""
    try:
        return load_object(path)
    except InputError:
        return {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text_whole(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one whole; no character stops it."""
    write_bytes_whole(path, text.encode("utf-8", "backslashreplace"))


def write_bytes_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one whole."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """Return a hidden name beside a file that no other thread has, of no process or machine."""
    own = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.{own}")
