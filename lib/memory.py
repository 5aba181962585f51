"""Sizes that can't fit: a computed lower bound beside the memory that there is, before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from lib.errors import InputError

GROUP_LIMITS = (  # of a container: version 2 of control groups, then version 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def memory_bytes() -> int | None:
    """Return the memory of this machine or container, or of a larger GPU; None where unknown."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None
    for path in GROUP_LIMITS:
        try:
            whole = min(whole, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return max([whole, *(torch.cuda.get_device_properties(one).total_memory for one in gpus)])


def check_fits(parts: Mapping[str, float], what: str) -> None:
    """Raise InputError where `parts`, bytes by the flag that asks for them, exceed the memory.

    The flag that asks for most is named.
    """
    needed, there = sum(parts.values()), memory_bytes()
    if there is not None and needed > there:
        flag = max(parts, key=parts.__getitem__)
        raise InputError(
            f"{flag}: {what} takes at least {needed / 1e9:,.0f} GB, and there are "
            f"{there / 1e9:,.0f} GB; make it smaller"
        )


def transformer_bytes(
    width: int, layers: int, inner: int, vocabulary: int = 0, positions: int = 0
) -> float:
    """Return the bytes of a transformer's float32 weights: its matrices and its tables."""
    matrices = layers * (4 * width**2 + 2 * width * inner)
    return 4.0 * (matrices + (vocabulary + positions) * width)
