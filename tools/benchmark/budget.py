"""Measurements one after another within a number of seconds; what fails or does not fit is told."""

from __future__ import annotations

import gc
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lib.errors import first_line
from lib.program import is_out_of_memory

Row = dict[str, Any]
LAST_WORDS = 1.0  # seconds of the budget that are left for the table


class OutOfTime(BaseException):
    """The budget is spent in the middle of a measurement; no `except Exception` may keep it."""


@dataclass(frozen=True)
class Planned:
    """One measurement: `measure()` returns its rows. Those of one `kind` take about as long.

    `guess` is how many seconds the first of a kind may take; `bar` is what it is to reach.
    """

    name: str
    kind: str
    measure: Callable[[], list[Row]]
    guess: float = 0.0
    bar: Mapping[str, float] = field(default_factory=dict)


def within(planned: Iterable[Planned], seconds: float) -> Iterator[Row]:
    """Yield the rows of what can be measured in so many seconds, in order.

    What would not fit into the time that is left, if it takes as long as the last of its kind or as
    was guessed, is a row that says so ("left_out"); so is what the time ends in the middle of
    ("failed"), and what raises anything: the rest goes on.
    """
    end = time.monotonic() + seconds - LAST_WORDS
    last: dict[str, float] = {}  # the first of a kind may have waited for a compiler
    for one in planned:
        left = end - time.monotonic()
        needed = last.get(one.kind, one.guess)
        if left <= 0 or needed > left:
            why = f"{max(0.0, left):.0f} s were left, and it takes about {needed:.0f}"
            yield _unmeasured(one, left_out=why)
            continue
        print(f"{one.name} ({left:.0f} s left)", file=sys.stderr, flush=True)
        started = time.monotonic()
        rows = _tried(one, left)
        last[one.kind] = time.monotonic() - started
        yield from rows


def _tried(one: Planned, left: float) -> list[Row]:
    """Return the measurement's rows, or one that tells in a sentence why there is none."""
    try:
        with stopped_after(left):
            return one.measure()
    except OutOfTime:
        return [_unmeasured(one, failed=f"stopped after {left:.0f} s: the budget was spent")]
    except Exception as error:  # whatever drivers and compilers raise: the next may work
        told = f"{'out of memory: ' if ran_out(error) else ''}{first_line(error)}"
        # in the JSON file alone, for who can't run it a second time
        return [_unmeasured(one, failed=told, fault=traceback.format_exc(limit=-6))]
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def ran_out(error: BaseException) -> bool:
    """Return True where memory ran out, as Python, torch or CUDA's driver say it."""
    return is_out_of_memory(error) or "out of memory" in str(error)


def _unmeasured(one: Planned, **told: str) -> Row:
    barred = {"bar": dict(one.bar), "met": None} if one.bar else {}
    return {"name": one.name, **barred, **told}


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs longer, where the system has a timer for it."""
    can = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not can or math.isinf(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, _out_of_time)
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        rest = max(0.01, others - (time.monotonic() - started)) if others else 0
        signal.setitimer(signal.ITIMER_REAL, rest)  # another's timer (of pytest-timeout) goes on
        signal.signal(signal.SIGALRM, before)


def _out_of_time(number: int, frame: Any) -> None:
    raise OutOfTime
