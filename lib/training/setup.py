"""What is settled before the first step: seeds, and how the backbones run."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from lib.methods.base import Method


def set_seed(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def recompute_backbones(model: Method) -> None:
    """Let the backbones keep nothing for the backward pass but each layer's input."""
    for backbone in _backbones(model):
        # the new name since transformers 5.23; 4.x has the old one alone
        new = getattr(backbone, "activation_checkpointing_enable", None)
        (new or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_backbones(model: Method) -> None:
    """Let torch.compile translate the backbones, in place: the weights keep their names."""
    for backbone in _backbones(model):
        backbone.compile(dynamic=True)


def _backbones(model: Method) -> Iterator[nn.Module]:
    for encoder in (model.image_encoder, model.text_encoder):
        if encoder is not None and hasattr(encoder, "backbone"):
            yield encoder.backbone
