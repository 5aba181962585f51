"""Mixed precision: autocast contexts, the loss scaler of fp16, functions that stay in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a factory of autocast contexts for `--amp off|bf16|fp16` on a device."""
    if amp == "off":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=DTYPES[amp])


def scaler_for(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler, switched off unless the arithmetic is fp16."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


@contextmanager
def without_graph(device: torch.device) -> Iterator[None]:
    """Switch gradient off; autocast must not keep weights for later that it casts meanwhile."""
    mixed = torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=mixed, cache_enabled=False):
        yield


def full_precision(function):
    """Run a function outside autocast, its half-precision tensor arguments cast to float32."""

    @wraps(function)
    def run(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        wide = [a.float() if isinstance(a, Tensor) and is_half(a) else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*wide, **kwargs)

    return run


def is_half(tensor: Tensor) -> bool:
    """Return whether a tensor holds half-precision numbers."""
    return tensor.dtype in (torch.float16, torch.bfloat16)
