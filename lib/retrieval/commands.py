"""Commands run one after another, each into a log, under one lock; Ctrl-C lets the child save."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from lib.errors import InputError

TICK_SECONDS = 5  # how often the caller is told that a command still runs

Execute = Callable[[list[str], Path, Callable[[], None]], int]


def executor(
    lock: int, stopped: threading.Event, environment: Mapping[str, str] | None = None
) -> Execute:
    """Return what runs a command into a log; the child holds the lock as well.

    A session of its own keeps Ctrl-C from reaching the child twice; once `stopped` is set it gets
    one SIGTERM, upon which train.py saves. `environment` is added to this process's own.
    """

    def execute(command: list[str], log: Path, tick: Callable[[], None]) -> int:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
                env={**os.environ, **(environment or {})},
            )
            try:
                while True:
                    for _ in range(TICK_SECONDS):
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            return process.wait(1)
                        if stopped.is_set():
                            raise KeyboardInterrupt
                    tick()
            except BaseException:
                process.terminate()
                process.wait()
                raise

    return execute


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold OUT/.lock; raise InputError where another comparison, or a run it left, is at work."""
    import fcntl  # POSIX only

    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out} is in use by another comparison or a run of it: wait for it to end, or "
                "choose another --out"
            ) from None
        yield file.fileno()


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP stop this program as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def runs_bar(total: int, done: int) -> tqdm:
    """Return the bar that counts runs, 80 columns wide."""
    return tqdm(
        total=total,
        initial=done,
        unit="run",
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
        ncols=80,
    )
