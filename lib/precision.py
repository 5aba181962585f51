"""Mixed precision: autocast contexts, and the loss scaler that fp16 needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a factory of autocast contexts for `--amp off|bf16|fp16` on a device."""
    if amp == "off":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=DTYPES[amp])


def scaler_for(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler, switched off unless the arithmetic is fp16."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
