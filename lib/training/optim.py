"""Parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

Ratio = float | Sequence[float]
Schedule = Callable[[int], float]


def parameter_groups(
    model: nn.Module, learning_rate: float, backbone_ratio: Ratio, weight_decay: float
) -> list[dict]:
    """Return AdamW groups: backbones at `backbone_ratio` of the learning rate, the rest at it all.

    A backbone is a module named `backbone` (ViT, Swin, BERT); projections are not part of it, and
    neither are LoRA's new layers. Two ratios are the image's and the text's. Biases, norms and
    scalars are decayed like the rest, as the LAPS family does. Source: SPEC 6.
    """
    if not isinstance(backbone_ratio, Sequence):
        backbone_ratio = (backbone_ratio, backbone_ratio)
    image, text = backbone_ratio
    rates = {"backbones": image, "text backbone": text, "heads": 1.0}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone" not in name.split(".") or "lora_" in name:
            groups["heads"].append(parameter)
        elif image != text and name.startswith("text_encoder."):
            groups["text backbone"].append(parameter)
        else:
            groups["backbones"].append(parameter)
    return [
        {"params": found, "lr": learning_rate * rates[name], "name": name}
        | {"weight_decay": weight_decay}
        for name, found in groups.items()
        if found
    ]


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    backbone_ratio: Ratio = 0.1,
    weight_decay: float = 1e-4,
    beta2: float = 0.999,
) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`, each group remembering its base rate as `base_lr`."""
    groups = parameter_groups(model, learning_rate, backbone_ratio, weight_decay)
    for group in groups:
        group["base_lr"] = group["lr"]
    # in one pass over the weights; on CUDA PyTorch chooses well by itself
    on_cpu = all(parameter.is_cpu for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True if on_cpu else None)


def step_decay(steps_per_epoch: int, epochs: Sequence[int], rate: float) -> Schedule:
    """Return the factor rate^n after n of the `epochs` have begun (SPEC 6)."""
    borders = [epoch * steps_per_epoch for epoch in epochs]
    return lambda step: rate ** sum(step >= border for border in borders)


def cosine_decay(total_steps: int) -> Schedule:
    """Return the half cosine from 1 at step 0 to 0 at the last step."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / max(1, total_steps)))


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """Return the schedule with a linear rise over its first `warmup_steps` steps."""
    if warmup_steps <= 0:
        return schedule
    return lambda step: schedule(step) * min(1.0, (step + 1) / warmup_steps)


def schedule(
    policy: str,
    steps_per_epoch: int,
    num_epochs: int,
    decay_epochs: Sequence[int],
    decay_rate: float,
    warmup_steps: int,
) -> Schedule:
    """Return the schedule that --lr_policy names: "cosine", or "step" at the `decay_epochs`."""
    if policy == "cosine":
        chosen = cosine_decay(num_epochs * steps_per_epoch)
    else:
        chosen = step_decay(steps_per_epoch, decay_epochs, decay_rate)
    return with_warmup(chosen, warmup_steps)


def schedule_from_args(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """Return the schedule that the flags describe."""
    return schedule(
        args.lr_policy,
        steps_per_epoch,
        args.num_epochs,
        args.lr_schedules,
        args.decay_rate,
        args.lr_warmup_steps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
