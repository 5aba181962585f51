"""Runs of a comparison carried out one after another, or several at a time."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from lib.retrieval.commands import runs_bar
from lib.retrieval.comparison import format_seconds
from tools.compare.runs import Planned

CarryOut = Callable[[Planned, Callable[[], None]], str | None]


class Pool:
    """Carries out runs, `jobs` at a time; a run whose flags name another's waits for it.

    `written` is called after each; what failed is in `failures`, by name.
    """

    def __init__(self, jobs: int, written: Callable[[], None]) -> None:
        self.jobs = max(1, jobs)
        self.written = written
        self.failures: dict[str, str] = {}
        self.stopped = threading.Event()
        self.alone = threading.Lock()  # for what runs in this process and not in a command's

    def environment(self) -> dict[str, str]:
        """Return what a command's environment needs so that jobs share the cores."""
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}

    def unfinished(self, names: Iterable[str]) -> list[str]:
        """Return a line for each of these runs: why it failed, or that it waits."""
        return [f"{name}: {self.failures.get(name, 'waiting')}" for name in names]

    def work(self, runs: Sequence[Planned], done: Sequence[Planned], carry_out: CarryOut) -> None:
        """Carry out the runs that are not done, in order, and show how far that is."""
        waiting = [run for run in runs if run not in done]
        bars = runs_bar(total=len(runs), done=len(done))
        with bars as bar, ThreadPoolExecutor(self.jobs) as threads:
            shown = _Progress(bar, len(waiting))
            going: dict[Future, Planned] = {}
            try:
                while waiting or going:
                    for run in self._ready(waiting, list(going.values())):
                        waiting.remove(run)
                        going[threads.submit(carry_out, run, shown.of(run))] = run
                    ended, _ = wait(going, return_when=FIRST_COMPLETED)
                    for future in ended:
                        self._ended(going.pop(future), future.result(), bar, shown)
            except BaseException:
                self.stopped.set()  # the commands end, each after it has saved
                raise

    def _ready(self, waiting: Sequence[Planned], going: Sequence[Planned]) -> list[Planned]:
        """Return the next runs there is room for; one that starts from another waits for it."""
        room, found = self.jobs - len(going), []
        open_runs = {(one.row.name, *_place(one)) for one in (*waiting, *going)}
        for run in waiting:
            needed = {(flag[1:], *_place(run)) for flag in run.row.flags if flag.startswith("@")}
            if len(found) < room and not needed & open_runs:
                found.append(run)
        return found

    def _ended(self, run: Planned, failure: str | None, bar: tqdm, shown: _Progress) -> None:
        if failure is not None:
            self.failures[run.name] = failure
            bar.write(f"{run.name} failed: {failure}", file=sys.stderr)
        shown.ended()
        bar.update(1)
        self.written()


def _place(run: Planned) -> tuple[Path, int]:
    """Return what runs that may start from each other share: their folder, and their seed."""
    return run.folder.parents[1], run.seed


class _Progress:
    """The bar's words: what runs now, and how long the rest will take."""

    def __init__(self, bar: tqdm, left: int) -> None:
        self.bar, self.left = bar, left
        self.begun, self.count = time.perf_counter(), 0
        self.lock = threading.Lock()

    def of(self, run: Planned) -> Callable[[], None]:
        """Return what the run calls now and then."""

        def show() -> None:
            with self.lock:
                self.bar.set_description(run.name, refresh=False)
                self.bar.set_postfix_str(f"{self._rest()} left")

        return show

    def ended(self) -> None:
        """Count a run that has ended."""
        self.count += 1
        self.left -= 1

    def _rest(self) -> str:
        if not self.count:
            return "?"
        spent = time.perf_counter() - self.begun
        return format_seconds(max(0.0, self.left * spent / self.count))
