"""Whether torchrun started these processes anew, after one of them failed."""

from __future__ import annotations

from typing import Any

from lib.distributed import gather_values, start_processes
from lib.rendezvous import environment_integer


def was_restarted(process_settings: dict[str, Any]) -> bool:
    """Return whether this is torchrun's restart, on every rank alike; all ranks call it.

    A node counts its own failures alone: where another's worker failed its processes are started
    anew as well, and are told of no restart. So the nodes meet first (`process_settings` are those
    of `start_processes`).
    """
    restarted = (environment_integer("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    here = environment_integer("LOCAL_WORLD_SIZE")
    if here is None or (environment_integer("WORLD_SIZE") or 1) <= here:
        return restarted
    start_processes(**process_settings)
    return any(gather_values(restarted))
