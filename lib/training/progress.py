"""Where a run stands; all of it is saved, so that resuming goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lib.distributed import gather_values, rank, world_size
from lib.errors import InputError

RESUMED_WITH_NEW_FLAGS = ("base_lr", "weight_decay", "betas")


@dataclass
class Progress:
    """Counters of a run; `epoch` is counted from 0 here and from 1 wherever it is shown."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already used
    pairs_per_batch: int = 0  # of all processes together
    step: int = 0  # optimizer steps
    learnt: int = 0  # steps whose gradient was not zero
    best_rsum: float = -1.0
    last_rsum: float = -1.0
    validated_step: int = -1
    validation_due: bool = False  # it was begun at this step, and is not done
    skipped: int = 0  # non-finite steps in a row
    bad_images: list[str] = field(default_factory=list)

    @property
    def shown_epoch(self) -> int:
        """Return the epoch under way, or just ended, counted from 1."""
        return max(1, self.epoch + int(self.batch > 0))


def training_state(
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    alone: bool = False,
) -> dict[str, Any]:
    """Return what resuming needs beside the model: plain values and tensors.

    Every rank must call it, as each one's random state is in it; `alone` leaves the others' out.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mine = {"cpu": torch.get_rng_state(), "cuda": cuda}
    return {
        "progress": asdict(progress),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": [mine] if alone else gather_values(mine),
    }


def saved_progress(state: dict[str, Any], pairs_per_batch: int) -> Progress:
    """Return where the saved run stood.

    Raises InputError where a batch now has another number of pairs, as neither the place in the
    epoch nor the schedule would fit.
    """
    then = state["progress"]["pairs_per_batch"]
    if then != pairs_per_batch:
        raise InputError(
            f"the run to go on with used {then} pairs a step on all processes together, this "
            f"call {pairs_per_batch}: change --batch_size or the number of processes"
        )
    saved = dict(state["progress"])
    saved.setdefault("learnt", saved["step"])  # runs from before it was counted
    return Progress(**saved)


def restore_optimizer(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Put back moments and loss scale; rates, decay and betas stay those of this call's flags.

    How weights are updated stays this device's: the loss scale goes by how the optimizer was made.
    """
    flags = [
        {key: group[key] for key in RESUMED_WITH_NEW_FLAGS} for group in optimizer.param_groups
    ]
    fused = optimizer.defaults["fused"]
    groups = [{**group, "fused": fused} for group in state["optimizer"]["param_groups"]]
    optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    for group, values in zip(optimizer.param_groups, flags, strict=True):
        group.update(values)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def restore_random_state(state: dict[str, Any], device: torch.device) -> bool:
    """Put back this rank's random state; return False where the number of processes differs."""
    if len(state["rng"]) != world_size():
        return False
    mine = state["rng"][rank()]
    torch.set_rng_state(mine["cpu"])
    if mine["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], device)
    return True
