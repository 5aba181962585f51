"""The progress bar of an evaluation: how far, and how much time is left."""

from __future__ import annotations

from tqdm import tqdm

from lib.distributed import is_main


def progress_bar(what: str, total: int, start: int = 0, shown: bool = True) -> tqdm:
    """Return a bar of 80 columns that the main process shows, with the time left."""
    return tqdm(
        total=total,
        initial=start,
        desc=what,
        disable=not (shown and is_main()),
        leave=False,
        ncols=80,
        mininterval=0.5,
        unit_scale=True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left",
    )
