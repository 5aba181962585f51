"""Work shared out among processes, on any machines, that see one folder.

Each item of work ends in a file of its own, written whole; who works on it keeps a file
`NAME.claim` beside it and touches that file now and then. A claim that is touched no longer is
another's to take. Claims only keep two from doing the same: where two do, both write one file.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

RESULT, CLAIM = ".npz", ".claim"
BEAT_SECONDS = 20.0  # between touches
STALE_SECONDS = 180.0  # by the file server's clock: several touches were missed
POLL_SECONDS = 1.0


def share_out(
    folder: Path,
    names: Sequence[str],
    work: Callable[[str], None],
    *,
    wait: bool = True,
    group: str = "",
    listed: Callable[[int], None] = lambda done: None,
) -> None:
    """Do `work(name)` for the names without a result in `folder` that no other process does.

    With `wait` it ends when every result is there, whoever made it; without, when each claim that
    is left was touched since: its holder lives, and was not killed a moment ago. `group` marks this
    process's claims; `listed` is told how many are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, since = False, 0.0
    while True:
        present = set(os.listdir(folder))
        left = [name for name in names if name + RESULT not in present]
        listed(len(names) - len(left))
        if not left:
            return
        mine = _take_one(folder, left, present, group)
        if mine is not None:
            since = 0.0
            with _held(folder / (mine + CLAIM)):
                if not (folder / (mine + RESULT)).exists():
                    work(mine)
            continue
        since = since or _now(folder)
        if not wait and all(_touched(folder / (name + CLAIM)) > since for name in left):
            return
        if wait and not waiting:
            told = f"{folder}: waiting for {len(left)} files that {holders(folder)} makes"
            print(told, file=sys.stderr)
        waiting = True
        time.sleep(POLL_SECONDS)


def holders(folder: Path) -> str:
    """Return who holds claims in a folder, in words."""
    told = {" ".join(_read(path).split()[:2]) for path in folder.glob(f"*{CLAIM}")}
    names = [f"process {pid} on {host}" for host, _, pid in (one.partition(" ") for one in told)]
    return ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "") or "another process"


def wait_for_group(folder: Path, group: str) -> None:
    """Wait until no living process of this group holds a claim in the folder."""
    while any(
        group in _read(path).split() and not _is_stale(path, _now(folder))
        for path in folder.glob(f"*{CLAIM}")
    ):
        time.sleep(POLL_SECONDS)


def _take_one(folder: Path, left: list[str], present: set[str], group: str) -> str | None:
    """Return a name that is now this process's: a free one, else one whose holder is gone."""
    for name in left:
        if name + CLAIM not in present and _take(folder / (name + CLAIM), group):
            return name
    now = _now(folder)
    for name in left:
        path = folder / (name + CLAIM)
        if _is_stale(path, now):
            path.unlink(missing_ok=True)
            if _take(path, group):
                return name
    return None


def _take(path: Path, group: str) -> bool:
    """Make a claim; return False where another process was first."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{socket.gethostname()} {os.getpid()} {group}\n")
    except FileExistsError:
        return False
    return True


def _is_stale(path: Path, now: float) -> bool:
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return True  # given back a moment ago
    host, _, rest = _read(path).partition(" ")
    pid = rest.split()[0] if rest.split() else ""
    if host == socket.gethostname() and pid.isdigit() and not _lives(int(pid)):
        return True
    return now - touched > STALE_SECONDS


def _touched(path: Path) -> float:
    """Return when a claim was touched last, 0 where it is given back."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _lives(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now(folder: Path) -> float:
    """Return the time by the clock of the folder's file system: machines' clocks differ."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as file:
        return os.fstat(file.fileno()).st_mtime


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Touch a claim while the block runs, then give it back."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)
