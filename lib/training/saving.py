"""Checkpoints of a run in its folder, each written from a snapshot while the training goes on."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lib.checkpoints.checkpoint import model_payload, save_payload
from lib.distributed import agree, is_main
from lib.methods.base import Method
from lib.training.progress import Progress


class CheckpointWriter:
    """Writes one checkpoint at a time into `folder`, on rank 0.

    `error` is what kept the last one from being written; `finish` raises it on every rank.
    `saved_step` is the step of the last training state, None before the first.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.error: Exception | None = None
        self.saved_step: int | None = None
        self._thread: threading.Thread | None = None

    def save(self, name: str, describe: Callable[[], dict[str, Any]]) -> None:
        """Begin to write what `describe()` returns as `name`; rank 0 alone calls it.

        The tensors are copied before this returns: the next step may change them.
        """
        if not is_main():
            return
        self._wait()
        if self.error is None:
            payload = snapshot(describe())
            self._thread = threading.Thread(target=self._write, args=(name, payload))
            self._thread.start()

    def finish(self, alone: bool = False) -> None:
        """Wait until everything is written. Raises OSError on every rank where it could not be.

        `alone` asks no other rank.
        """
        self._wait()
        if not alone:
            agree(self.error)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, name: str, payload: dict[str, Any]) -> None:
        try:
            save_payload(self.folder / name, payload)
        except Exception as error:  # nobody would see it here: the training loop asks for it
            self.error = error


def run_payload(
    model: Method,
    progress: Progress,
    args: argparse.Namespace,
    vocabulary: list[str] | None,
    data: dict[str, Any],
) -> dict[str, Any]:
    """Return a checkpoint's payload without the training state; `data` is the fingerprint."""
    return model_payload(
        model,
        args,
        vocabulary,
        epoch=progress.epoch,
        step=progress.step,
        best_rsum=progress.best_rsum,
        val_split=args.val_split,
        hard_negatives=model.criterion.hard_negatives,
        data=data,
    )


def snapshot(value: Any) -> Any:
    """Return nested dictionaries and lists with a copy, on the CPU, of each tensor in them."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(one) for one in value)
    return value
