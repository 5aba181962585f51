"""Ask a backend for the texts that a file lacks, write them as they come, stop where all fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.data.describe.outcomes import Backend, Outcome, Sampling, Task
from lib.data.describe.texts import (
    TextFile,
    described,
    part_file,
    part_files,
    put_together,
)
from lib.errors import InputError

MOST_BROKEN = 20  # images in a row without an answer from server or model: it is gone


@dataclass
class Tally:
    """What a call came to."""

    images: int = 0
    known: int = 0  # had a text before
    written: int = 0
    cut: int = 0  # texts that used up max_new_tokens
    failed: dict[str, str] = field(default_factory=dict)  # reason by file name
    stopped: str | None = None  # why not all images were asked for
    file: Path | None = None
    parts_missing: bool = False


class _Gone(Exception):
    """Server or model no longer answer."""


def parse_part(text: str) -> tuple[int, int]:
    """Return (i, n) of i/n, 1 ≤ i ≤ n. Raises InputError."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--part {text}: give i/n with i from 1 to n, as 1/4")
    return int(number), int(count)


def describe_images(
    tasks: Sequence[Task],
    path: Path,
    make_backend: Callable[[], Backend],
    sampling: Sampling,
    part: tuple[int, int] | None = None,
    limit: int | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write the texts that `path` lacks; with `part` only this share of them, into its own file.

    `limit` asks for the first images alone.
    The backend is made only where there is something to do. Parts become one file as soon as they
    cover all images. Raises InputError for files that can't be gone on with.
    """
    goal = path if part is None else part_file(path, *part)
    mine = list(tasks) if part is None else list(tasks)[part[0] - 1 :: part[1]]
    mine = mine[:limit]
    with TextFile(goal) as texts:
        done = described(path, tasks)
        for one in part_files(path):
            done |= described(one, tasks)
        waiting = [task for task in mine if task.image_id not in done]
        tally = Tally(images=len(mine), known=len(mine) - len(waiting), file=goal)
        progress(tally)
        texts.start_failures()
        if waiting:
            _ask(waiting, make_backend(), texts, sampling, tally, progress)
    merged = put_together(path, tasks)
    if merged:
        tally.file = path
    tally.parts_missing = not merged and bool(part_files(path))
    return tally


def _ask(
    waiting: Sequence[Task],
    backend: Backend,
    texts: TextFile,
    sampling: Sampling,
    tally: Tally,
    progress: Callable[[Tally], None],
) -> None:
    broken = 0

    def emit(task: Task, outcome: Outcome) -> None:
        nonlocal broken
        if outcome.text is not None:
            texts.add(_record(task, outcome.text, backend.name, sampling))
            tally.written += 1
            tally.cut += outcome.cut
            broken = 0
        else:
            texts.fail(task, outcome.reason or "no text")
            tally.failed[task.name] = outcome.reason or "no text"
            broken = broken + 1 if outcome.broken else 0
        progress(tally)
        if broken >= min(MOST_BROKEN, len(waiting)):
            raise _Gone(outcome.reason)

    try:
        backend.describe(waiting, emit)
    except _Gone as error:
        tally.stopped = f"{broken} images in a row got no answer ({error})"


def _record(task: Task, text: str, model: str, sampling: Sampling) -> dict[str, str]:
    return {
        "image_id": task.image_id,
        "file_name": task.name,
        "text": text,
        "model": model,
        "prompt_sha": sampling.prompt_sha,
    }
