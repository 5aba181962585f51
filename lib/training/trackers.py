"""Where a run's curves go: TensorBoard, Weights & Biases, trackio (`--report_to`)."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lib.errors import InputError, as_input_error
from lib.files import write_text_whole

KNOWN = ("tensorboard", "wandb", "trackio")
RUN_ID = "tracker_id"  # a file of the run folder


class Tracker(Protocol):
    """One place that numbers and pictures are written to."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write numbers by name."""

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write an RGB uint8 picture (H, W, 3)."""

    def settings(self, values: dict[str, Any], table: str) -> None:
        """Write the run's flags; `table` is Markdown of them."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """Event files in the run folder; those behind `step` are taken back."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def settings(self, values: dict[str, Any], table: str) -> None:
        self._writer.add_text("arguments", table, 0)

    def close(self) -> None:
        self._writer.close()


class Service:
    """wandb or trackio, which share an interface: project "seps".

    `module` is the imported package of the `service`; `settings` say which run is begun or gone on
    with. Raises InputError where it can't be; later on the methods raise whatever the package does.
    """

    def __init__(self, service: str, module: Any, **settings: Any) -> None:
        self.name = service
        self._module = module
        with as_input_error(
            f"--report_to {service}: no run can be opened there; leave it out or mend it"
        ):
            self._run = module.init(project="seps", resume="allow", **settings)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self._module.log({name: self._module.Image(picture)}, step=step)

    def settings(self, values: dict[str, Any], table: str) -> None:
        if hasattr(self._run, "config"):
            plain = {key: value for key, value in values.items() if value is not None}
            self._run.config.update(plain)

    def close(self) -> None:
        self._module.finish()


def open_trackers(names: Sequence[str], folder: Path, step: int) -> list[Tracker]:
    """Return the trackers of `names`, of a run in `folder` that begins behind `step`."""
    own = run_id(folder, step) if set(names) - {"tensorboard"} else ""
    return [
        TensorBoard(folder, step) if name == "tensorboard" else _service(name, folder, own)
        for name in names
    ]


def _service(name: str, folder: Path, own: str) -> Service:
    module = imported(name)
    if name == "wandb":
        return Service(name, module, name=folder.name, id=own, dir=str(folder))
    return Service(name, module, name=f"{folder.name}-{own[:8]}")  # its names tell runs apart


def run_id(folder: Path, step: int) -> str:
    """Return what a service tells the run in `folder` by, kept there for when it goes on.

    A run that begins (`step` 0) gets a new one, whatever lies there: folders of the same name
    elsewhere, and a run that was begun there before, are other runs.
    """
    kept = folder / RUN_ID
    if step and kept.exists():
        return kept.read_text(encoding="utf-8").strip()
    own = f"{socket.gethostname()}\n{folder.absolute()}\n{time.time_ns()}"
    found = hashlib.sha256(os.fsencode(own)).hexdigest()[:16]
    write_text_whole(kept, found + "\n")
    return found


def imported(name: str) -> Any:
    """Return the package. Raises InputError where it is not installed."""
    try:
        return __import__(name)
    except ImportError:
        raise InputError(
            f"--report_to {name}: the package is not installed: pip install {name}"
        ) from None


def tracker_names(text: str) -> list[str]:
    """Return the names in `--report_to`, separated by commas; "none" gives none.

    Raises InputError for one that is unknown or not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in KNOWN:
            raise InputError(f"--report_to {name}: give some of {', '.join(KNOWN)}, or none")
        if name != "tensorboard":
            imported(name)
    return list(dict.fromkeys(names))
