"""Where the wall time of training goes: waiting for data, or working."""

from __future__ import annotations

import time
from collections.abc import Iterator


class Clock:
    """Splits wall time into waiting for data and working, over the steps since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.waited, self.pairs, self.steps = 0.0, 0, 0

    def waiting(self, batches: Iterator) -> Iterator:
        """Yield from `batches`, counting the time that each one takes to come."""
        while True:
            before = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield item

    def stepped(self, pairs: int) -> None:
        self.pairs += pairs
        self.steps += 1

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / max(1e-9, time.perf_counter() - self.started)

    def scalars(self) -> dict[str, float]:
        """Return mean seconds per step and pairs a second since the last call, and start anew."""
        elapsed, steps = time.perf_counter() - self.started, max(1, self.steps)
        values = {
            "time/data_s": self.waited / steps,
            "time/step_s": (elapsed - self.waited) / steps,
            "time/images_per_s": self.pairs_per_second,
        }
        self.restart()
        return values
