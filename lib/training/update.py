"""One optimizer step: forward and backward over a group of batches, then the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.batch import Batch
from lib.distributed import world_size
from lib.methods.base import Method
from lib.model.precision import scaler_for

LOWEST_LOSS_SCALE = 2.0**-14  # fp16: below this, gradients overflow whatever the scale


@dataclass(frozen=True)
class Outcome:
    """What a step came to; `not_finite` names what kept the weights as they were."""

    losses: dict[str, float]  # each part's mean over the group
    norm: float  # of the gradient, before clipping
    not_finite: list[str]

    @property
    def learnt(self) -> bool:
        """Return whether there was a gradient to learn from."""
        return not self.not_finite and math.isfinite(self.norm) and self.norm > 0


class Update:
    """Takes steps on `network`, which is `model` or wraps it for several processes.

    `halfway` is True while the weights are half of one step and half of the next.
    """

    def __init__(
        self,
        model: Method,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        autocast: Callable,
        amp: str = "off",
        grad_clip: float = 0.0,
    ) -> None:
        self.model = model
        self.network = network
        self.optimizer = optimizer
        self.device = device
        self.autocast = autocast
        self.scaler = scaler_for(amp, device)
        self.grad_clip = grad_clip
        self.halfway = False

    def step(self, group: list[Batch]) -> Outcome:
        """Update the weights by the mean gradient of the group, where everything is finite."""
        losses, norm = self._forward_backward(group)
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > LOWEST_LOSS_SCALE
        if not math.isfinite(norm) and not overflow:
            bad.append("gradient norm")
        if not bad:
            self.halfway = True
            self.scaler.step(self.optimizer)
            self.halfway = False
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(losses, norm, bad)

    def _forward_backward(self, group: list[Batch]) -> tuple[dict[str, float], float]:
        """Return each loss part's mean over the group, and the gradient norm before clipping."""
        total: dict[str, float] = {}
        for index, batch in enumerate(group):
            last = index == len(group) - 1
            wait = nullcontext() if last or world_size() == 1 else self.network.no_sync()
            with wait:
                losses = self._losses(batch.to(self.device))
                self.scaler.scale(losses["loss"] / len(group)).backward()
            for name, value in zip(losses, _values(losses.values()), strict=True):
                total[name] = total.get(name, 0.0) + value / len(group)
        self.scaler.unscale_(self.optimizer)
        limit = self.grad_clip if self.grad_clip > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return total, float(norm)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        with self.autocast():
            return self.network(
                batch.pixels,
                batch.ids,
                batch.lengths,
                batch.image_ids,
                batch.dense_ids,
                batch.dense_lengths,
                batch.pixel_lengths,
            )


def _values(scalars: Iterable[Tensor]) -> list[float]:
    """Return what the scalars hold, waiting for their device once for all of them."""
    return torch.stack([one.detach().reshape(()).double() for one in scalars]).tolist()
