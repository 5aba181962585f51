"""Where a run's curves go: TensorBoard, Weights & Biases, trackio (`--report_to`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lib.errors import InputError

KNOWN = ("tensorboard", "wandb", "trackio")


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
    """wandb or trackio, which share an interface: project "seps", the run named as its folder.

    A run that goes on adds to the one of its name. `module` is the imported package.
    """

    def __init__(self, module: Any, folder: Path, **settings: Any) -> None:
        self._module = module
        self._run = module.init(project="seps", name=folder.name, resume="allow", **settings)

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
    return [_open(name, folder, step) for name in names]


def _open(name: str, folder: Path, step: int) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(folder, step)
    module = imported(name)
    if name == "wandb":  # one id a folder: a resumed run goes on where it was
        return Service(module, folder, id=folder.name, dir=str(folder))
    return Service(module, folder)


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
