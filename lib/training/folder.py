"""A run folder: whether a run may be begun or gone on with in it, and who uses it now."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lib.checkpoints.checkpoint import BEST, LAST
from lib.distributed import gather_values, hosts_without, on_main
from lib.errors import InputError, InputWarning
from lib.rendezvous import environment_integer
from lib.training.trackers import RUN_ID

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module else

LOCK = ".lock"
LEFTOVERS = (
    *(LAST, BEST, "results.json", "ranks_*.npz"),
    *("args.json", "train.log", "events.out*", RUN_ID),
)
IN_USE = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def check_folder(folder: str | Path, resume: bool = False, overwrite: bool = False) -> None:
    """Raise InputError where a new run would write over an old one, or there is none to resume."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--logger_name {folder}: a file of that name is there; name a folder")
    if resume:
        _check_resumable(folder)
    elif not overwrite and any((folder / name).exists() for name in (LAST, BEST)):
        raise InputError(
            f"{folder} already holds a run: go on with --resume {folder}, choose another "
            "--logger_name, or start anew with --overwrite 1"
        )


def _check_resumable(folder: Path) -> None:
    if not (folder / "args.json").exists():
        several = (environment_integer("WORLD_SIZE") or 1) > 1
        here = f" on {socket.gethostname()}, and all nodes must see the run folder" * several
        raise InputError(f"--resume {folder}: no args.json there{here}, so no run to go on with")
    if (folder / LAST).exists():
        return
    if (folder / BEST).exists():
        raise InputError(
            f"--resume {folder}: {BEST} is there, but no {LAST} to go on from; evaluate it, or "
            f"start a new run in another --logger_name"
        )
    raise InputError(
        f"--resume {folder}: the run ended before its first checkpoint, so there is nothing to go "
        f"on from; start it anew with --logger_name {folder}"
    )


def check_same_folder(resumed: str | Path, named: str | Path | None) -> None:
    """Raise InputError where a run that goes on is given another folder than its own."""
    if named is not None and Path(named).absolute() != Path(resumed).absolute():
        raise InputError(
            f"--logger_name {named}: a run goes on in its own folder, --resume {resumed}; leave "
            "--logger_name out"
        )


def check_same_run(
    folder: str | Path, state: dict[str, Any], method: str, seed: int, data: Sequence[str]
) -> None:
    """Raise InputError where a checkpoint is of another method, seed or data than asked for.

    `data` says in words what differs in the data.
    """
    differing = list(data)
    if state["method"] != method:
        differing.append(f"method {method} (was {state['method']})")
    then = state["args"].get("seed", seed)
    if then != seed:
        differing.append(f"seed {seed} (was {then})")
    if differing:
        raise InputError(
            f"--resume {folder}: this is not what the run was begun with: {', '.join(differing)}; "
            "give it what it had, or start a new run"
        )


@contextmanager
def claimed(
    folder: str | Path, resume: str | None = None, read_by_all: bool = False
) -> Iterator[None]:
    """Keep other runs out of a folder, made where it is missing, while the block runs.

    Every rank enters it, rank 0 holds the lock, and a crash lets it go. Raises InputError on every
    rank where another run holds it, or the folder can't be written; or where a node does not see it
    though all must read it, to `resume` or in the end (`read_by_all`).
    """
    file = on_main(lambda: _lock(Path(folder)))
    try:
        _check_seen(folder, resume, read_by_all)
        yield
    finally:
        if file is not None:
            file.close()


def _check_seen(folder: str | Path, resume: str | None, read_by_all: bool) -> None:
    """Warn of a folder that not every node sees; InputError where every one must read it."""
    unseen = hosts_without(folder)
    if not unseen:
        return
    told = f"{folder}: {', '.join(unseen)} does not see what rank 0 writes there"
    if read_by_all or any(gather_values(resume)):
        raise InputError(f"{told}; put the run folder on a disk that all nodes share")
    warnings.warn(
        f"{told}, so --resume and torchrun's restarts will not work: better put the run folder on "
        "a disk that all nodes share",
        InputWarning,
        stacklevel=3,
    )


def _lock(folder: Path) -> IO | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # held open for the whole run: closing any handle of the file lets the lock go
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"--logger_name {folder} can't be written ({error.strerror}); choose another folder"
        ) from None
    try:
        _take(file)
    except OSError as error:
        if error.errno not in IN_USE:
            return file  # a file system without locks
        file.seek(0)
        holder = " ".join(file.read().split())[:100]
        file.close()
        raise InputError(
            f"{folder} is in use by another run ({holder or 'unknown'}): wait for it, stop it, or "
            "choose another --logger_name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _take(file: IO) -> None:
    """Take the lock of this process alone: children that it forks do not hold it on."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(2**20)  # a byte that nobody reads: others may read who holds the lock
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)


def clear_run(folder: str | Path) -> None:
    """Remove what a former run left in a folder that is to be written over; every rank calls it."""

    def clear() -> None:
        for pattern in LEFTOVERS:
            for path in Path(folder).glob(pattern):
                path.unlink()

    on_main(clear)
