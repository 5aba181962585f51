"""A run folder's records: train.log, Parameters.txt, args.json, TensorBoard events."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lib.checkpoints.checkpoint import plain_arguments
from lib.distributed import barrier, is_main
from lib.files import write_text_whole


class RunLog:
    """Writes what a run says and measures; on ranks other than 0 every call does nothing.

    `folder` None keeps everything on the terminal.
    """

    def __init__(self, folder: str | Path | None, active: bool = True) -> None:
        self.active = active
        self.folder = Path(folder) if folder is not None and active else None
        self.writer = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def open_curves(self, step: int) -> None:
        """Begin TensorBoard events behind `step`; what a killed run wrote later is taken back."""
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def say(self, text: str) -> None:
        """Print a line above any progress bar, and append it to train.log with the time."""
        if not self.active:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        if self.folder is not None:
            stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            path = self.folder / "train.log"
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{stamp} {text}\n")

    def arguments(self, args: argparse.Namespace) -> None:
        """Write Parameters.txt (a flag a line), args.json and TensorBoard's text of them."""
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
        if self.writer is not None:
            # protocol buffers take no lone surrogates, which undecodable paths hold
            table = table.encode("utf-8", "backslashreplace").decode("utf-8")
            self.writer.add_text("arguments", table, 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write TensorBoard scalars at `step`."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write an RGB uint8 picture (H, W, 3) to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.writer.close()


def clear_run(folder: str | Path, checkpoints: Sequence[str]) -> None:
    """Remove what a former run left in a folder that is to be written over; every rank calls it."""
    if is_main():
        for pattern in (*checkpoints, "results.json", "args.json", "train.log", "events.out*"):
            for path in Path(folder).glob(pattern):
                path.unlink()
    barrier()


def flatten_metrics(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return `{"val/i2t_r1": …, "val/rsum": …}` from what `recall_metrics` returns."""
    flat = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat.update({f"{prefix}/{key}_{name}": float(one) for name, one in value.items()})
        else:
            flat[f"{prefix}/{key}"] = float(value)
    return flat
