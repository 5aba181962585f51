"""A run folder's records: train.log, Parameters.txt, args.json, TensorBoard events."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from lib.checkpoints.checkpoint import plain_arguments
from lib.distributed import is_main
from lib.errors import first_line
from lib.files import write_text_whole
from lib.training.trackers import Service, Tracker, open_trackers

FALLBACK = "backslashreplace"  # what an unprintable character becomes


class RunLog:
    """Writes what a run says and measures; on ranks other than 0 every call does nothing.

    `folder` None keeps everything on the terminal.
    """

    def __init__(
        self,
        folder: str | Path | None,
        active: bool = True,
        report_to: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.active = active
        self.folder = Path(folder) if folder is not None and active else None
        self.trackers: list[Tracker] = []
        self._report_to = report_to if active else ()
        self._unchanged: dict[str, tuple[float, int, int]] = {}  # name: value, first, last step
        self._changing: set[str] = set()
        self._told: set[str] = set()  # where records could not be written
        self._early: list[str] | None = []  # lines before the folder is this run's
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int, args: argparse.Namespace) -> None:
        """Open the records of a run behind `step`, and write what it is made with."""
        self.open_curves(step)
        self.arguments(args)

    def open_curves(self, step: int) -> None:
        """Begin to write into the folder and its trackers, behind `step`.

        What was said before is kept until now, as a run that fails to begin changes no file.
        """
        if self.folder is not None:
            self._write_early()
            self.trackers = open_trackers(self._report_to, self.folder, step)

    def say(self, text: str, only_in_file: bool = False) -> None:
        """Print a line above any progress bar, and append it to train.log with the time."""
        if not self.active:
            return
        if not only_in_file:
            tqdm.write(printable(text, sys.stdout), file=sys.stdout)
            sys.stdout.flush()
        if self.folder is not None:
            stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            self._append(f"{stamp} {text}\n")

    def _append(self, line: str) -> None:
        if self._early is not None:
            self._early.append(line)
            return
        with self._kept_going():
            append_text(self.folder / "train.log", line)

    def _write_early(self) -> None:
        early, self._early = self._early or [], None
        self._append("".join(early))

    def arguments(self, args: argparse.Namespace) -> None:
        """Write Parameters.txt (a flag a line), args.json and the trackers' text of them."""
        if self.folder is None:
            return
        plain = plain_arguments(args)
        lines = [f"{key}: {value}" for key, value in sorted(plain.items())]
        write_text_whole(self.folder / "Parameters.txt", "\n".join(lines) + "\n")
        write_text_whole(
            self.folder / "args.json", json.dumps(plain, indent=2, sort_keys=True) + "\n"
        )
        table = "| flag | value |\n|---|---|\n"
        table += "\n".join(f"| {key} | {value} |" for key, value in sorted(plain.items()))
        table = table.encode("utf-8", FALLBACK).decode()
        self._track(lambda tracker: tracker.settings(plain, table))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write numbers at `step` to every tracker."""
        self._track(lambda tracker: tracker.scalars(values, step))

    def changing_scalars(self, values: dict[str, float], step: int) -> None:
        """Write scalars as `scalars` does, but none of a name whose value is always the same.

        Once it changes, both ends of the stretch before are drawn too.
        """
        for name, value in values.items():
            if name not in self._changing:
                first, begun, last = self._unchanged.get(name, (value, step, step))
                if math.isclose(value, first, rel_tol=1e-5, abs_tol=1e-12):
                    self._unchanged[name] = first, begun, step
                    continue
                self._changing.add(name)
                for place in dict.fromkeys((begun, last)):
                    self.scalars({name: first}, place)
            self.scalars({name: value}, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write an RGB uint8 picture (H, W, 3) to every tracker."""
        self._track(lambda tracker: tracker.image(name, picture, step))

    def _track(self, write: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            if isinstance(tracker, Service):  # what a service raises is not ours to list
                with self._kept_going(tracker.name, Exception):
                    write(tracker)
            else:
                with self._kept_going():
                    write(tracker)

    @contextmanager
    def _kept_going(
        self, place: str | None = None, errors: type[Exception] = OSError
    ) -> Iterator[None]:
        """A record that can't be written is told once and ends no run; checkpoints are another."""
        place = place or str(self.folder)
        try:
            yield
        except errors as error:
            if place not in self._told:
                told = f"warning: {place}: records can't be written ({first_line(error)})"
                print(told, file=sys.stderr)
            self._told.add(place)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self.folder is not None:
            self._write_early()
        self._track(lambda tracker: tracker.close())


def append_text(path: Path, text: str) -> None:
    """Append to a file; a character that UTF-8 lacks (half of a file name's byte) is escaped."""
    with open(path, "a", encoding="utf-8", errors=FALLBACK) as file:
        file.write(text)


def printable(text: str, stream: TextIO) -> str:
    """Return the text with what the stream's encoding lacks escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, FALLBACK).decode(encoding)


def epoch_bar(epoch: int, epochs: int, batches: int, done: int) -> tqdm:
    """Return the progress bar of an epoch, counted from 0, of whose batches some are `done`."""
    return tqdm(
        total=batches,
        initial=done,
        desc=f"epoch {epoch + 1}/{epochs}",
        disable=not is_main(),
        leave=False,
        ncols=80,
        mininterval=0.5,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
    )


def entries_apart(total_steps: int) -> int:
    """Return how many steps lie between log entries: a run has about 100, or one in 200 steps."""
    return max(1, min(200, total_steps // 100))


def flatten_metrics(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return `{"val/i2t_r1": …, "val/rsum": …}` from what `recall_metrics` returns."""
    flat = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat.update({f"{prefix}/{key}_{name}": float(one) for name, one in value.items()})
        else:
            flat[f"{prefix}/{key}"] = float(value)
    return flat
