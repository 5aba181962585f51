"""Loader worker processes: how they begin, and one sentence where one ends or can't deliver."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from lib.batch import Batch
from lib.errors import InputError, WorkerError

LOST_BATCH = 70  # exit code of a worker that can't hand over what it made
SHARED_MEMORY = (
    "there is too little shared memory (/dev/shm) for the loader workers' batches: use --workers 0,"
    " or give the container more (docker run --shm-size 8g)"
)
KILLED = (
    "a loader worker was killed, most likely for want of memory: fewer --workers need less, "
    "--workers 0 none of their own"
)
OPEN_FILES = (
    "the loader workers need more open files than are allowed: raise ulimit -n, or --workers 0"
)


def begin_worker(_: int) -> None:
    """Keep Ctrl-C and a SIGTERM for the whole group from a worker: the training loop decides.

    A worker must go on obeying a SIGTERM of its own: that is how the interpreter ends workers when
    it exits, and it would wait for ever for one that ignored it. It ends without an error then, so
    that a signal to every process (a scheduler's) does not interrupt the step under way. A batch
    that can't be sent ends the worker: the queue would drop it, and it would be waited for for
    ever.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    queue: Any = multiprocessing.queues.Queue  # whose hook is private, and told to no type checker
    queue._on_queue_feeder_error = staticmethod(_end_after_lost_batch)


def _end_after_lost_batch(error: Exception, item: Any) -> None:
    print(f"a loader worker could not send its batch: {error!r:.200}", file=sys.stderr, flush=True)
    os._exit(LOST_BATCH)


def placed(batch: Batch | None) -> Batch | None:
    """Return the batch in shared memory where this is a worker; elsewhere as it is.

    Raises WorkerError where it does not fit, which the training process is then told.
    """
    if batch is None or get_worker_info() is None:
        return batch
    try:
        return batch.share_memory()
    except (RuntimeError, OSError) as error:
        raise WorkerError(_told(error)) from None


def watched(loader: DataLoader) -> Iterator[Any]:
    """Yield what the loader does; raises WorkerError for what goes wrong between its processes."""
    try:
        iterator = _iterator(loader)
    except (RuntimeError, OSError) as error:
        raise _translated(error, loader) from None
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (InputError, WorkerError) as error:
            raise type(error)(_last_line(error)) from None
        except (RuntimeError, OSError, EOFError) as error:
            raise _translated(error, loader) from error
        yield item


def _iterator(loader: DataLoader) -> Iterator[Any]:
    """Return the loader's iterator, without the signal handler that torch sets beside it.

    It raises wherever the program happens to be, in the middle of a checkpoint too; the end of a
    worker is noticed within seconds where its batch is waited for.
    """
    child = getattr(signal, "SIGCHLD", None)
    if child is None or not loader.num_workers:
        return iter(loader)
    previous = signal.getsignal(child)
    iterator = iter(loader)
    with suppress(ValueError):  # not the main thread, where torch sets none
        signal.signal(child, signal.SIG_DFL if previous is None else previous)
    return iterator


def _translated(error: Exception, loader: DataLoader) -> Exception:
    """Return the WorkerError that `error` amounts to, or `error` where the cause is another."""
    if not loader.num_workers:
        return error
    text = str(error)
    ended = "exited unexpectedly" in text or "killed by signal" in text
    if ended or isinstance(error, EOFError) or "Pin memory thread" in text:
        return WorkerError(_told_of_exit(_exit_codes(loader)))
    known = _told(error)
    return error if known == text else WorkerError(known)


def _exit_codes(loader: DataLoader) -> set[int]:
    workers = getattr(getattr(loader, "_iterator", None), "_workers", [])
    return {worker.exitcode for worker in workers if worker.exitcode is not None}


def _told_of_exit(codes: set[int]) -> str:
    if LOST_BATCH in codes or -getattr(signal, "SIGBUS", 7) in codes:
        return SHARED_MEMORY
    if -9 in codes:
        return KILLED
    if codes <= {0}:
        return "the loader workers were ended from outside; go on with --resume"
    return f"a loader worker ended unexpectedly (exit code {min(codes)}): try --workers 0"


def _told(error: Exception) -> str:
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:
        return OPEN_FILES
    if any(sign in text for sign in ("shared memory", "shm", "No space left on device")):
        return SHARED_MEMORY
    return text


def _last_line(error: Exception) -> str:
    """Return the sentence alone: torch wraps it into the worker's traceback."""
    told = str(error).strip() or type(error).__name__
    if not told.startswith("Caught "):
        return told
    # our errors are one line whatever they quote, and so is the traceback that torch puts before
    return told.rsplit(f"{type(error).__name__}: ", 1)[-1]
