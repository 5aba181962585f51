"""Shards -> training batches of one process, epoch by epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from lib.batch import Batch
from lib.data.loaders import make_loader
from lib.data.shards import ShardStream, Share
from lib.data.workers import watched
from lib.errors import InputError


class ShardLoader:
    """Training batches out of shards; the same steps on every rank."""

    def __init__(self, stream: ShardStream, workers: int, pin_memory: bool = False) -> None:
        self._stream = stream
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        return self._stream.share.steps

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch | None, list[str]]]:
        """Return (Batch, bad samples) for each step of the epoch from `start_step` on.

        Raises InputError for a shard that can't be read, WorkerError where a worker ends.
        """
        self._stream.share = replace(self._stream.share, epoch=epoch, start_step=start_step)
        loader = make_loader(
            self._stream,
            self._stream.tokenizer,
            self._workers,
            self._pin_memory,
            batch_size=self._stream.share.batch_size,
        )
        return watched(loader)


def plan_share(
    images: int, shards: int, batch_size: int, workers: int, rank: int = 0, world: int = 1
) -> tuple[Share, int]:
    """Return a process's share of an epoch over all images, and its number of worker processes.

    Each worker of each process needs a shard of its own; fewer workers are taken where there are
    fewer shards. Raises InputError where a process would have none, or not one batch is filled.
    """
    if shards < world:
        raise InputError(
            f"--shards: {shards} shards for {world} processes; each needs one at least"
        )
    if images < batch_size * world:
        raise InputError(
            f"--batch_size {batch_size} on {world} process(es) is more than the {images} samples "
            "of the shards; make it smaller"
        )
    workers = min(workers, os.cpu_count() or 1, shards // world)
    steps = images // (batch_size * world)
    return Share(batch_size, steps, rank, world, max(1, workers)), workers
