"""Signals that ask a run to stop: noted, so that the step under way ends first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether SIGINT or SIGTERM came while `caught` was entered."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note the first SIGINT and the first SIGTERM; a second one kills as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets the main thread alone handle signals
            return
        previous: dict[int, Any] = {}  # handlers, as `signal` knows them

        def note(number: int, frame: object) -> None:
            self.number = number
            signal.signal(number, previous[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for taken, handler in previous.items():
                signal.signal(taken, handler)
