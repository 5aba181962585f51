"""What is settled before the first step: seeds, and how the encoders run."""

from __future__ import annotations

import ctypes
import random
import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.errors import InputError, InputWarning
from lib.methods.base import Method
from lib.model.chunks import ChunkedEncoder

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def set_seed(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, blocks of up to 1 GiB too, where it is glibc.

    A step on the CPU takes and frees many large blocks. Each one given back to the system comes
    anew as zeroed pages, which was 6 to 12 % of a step (docs/performance.md). The peak of memory is
    the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not mallopt(M_MMAP_THRESHOLD, 2**30):
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take


def set_encoders_up(model: Method, cached_batch: int, gradient_checkpointing: bool) -> None:
    """Save the encoders' memory as the flags of these names say. Raises InputError.

    Warns where nothing would train the image encoder.
    """
    if _is_without_gradient(model):
        warnings.warn(
            f"nothing trains the image encoder: {model.name} takes the gradient from its patches, "
            "and it has no [CLS]; --detach_patches 0 gives the gradient back",
            InputWarning,
            stacklevel=2,
        )
    encode_in_chunks(model, cached_batch)
    if gradient_checkpointing:
        recompute_backbones(model)


def _is_without_gradient(model: Method) -> bool:
    detached = getattr(model, "detach_patches", False) and not model.image_encoder.has_cls
    gate = getattr(getattr(model, "dense_match", None), "gate", None)  # it reads patches too
    return detached and gate is None and model.global_loss is None


def encode_in_chunks(model: Method, rows: int) -> None:
    """Let the encoders take at most so many images or texts at once, 0: any (`--cached_batch`).

    Raises InputError for an encoder whose features of an image depend on the batch it is in.
    """
    for module in model.modules():
        if isinstance(module, ChunkedEncoder):
            if rows and _trains_batch_norm(module):
                raise InputError(
                    f"--cached_batch {rows}: an encoder has BatchNorm, whose statistics are of the "
                    "whole batch and not of chunks; freeze it (--freeze image), take another "
                    "--vit_type, or leave the flag out"
                )
            module.rows_at_once = rows


def _trains_batch_norm(encoder: ChunkedEncoder) -> bool:
    norms = any(isinstance(one, _BatchNorm) for one in encoder.modules())
    return norms and not getattr(encoder, "frozen", False)


def recompute_backbones(model: Method) -> None:
    """Let the backbones keep nothing for the backward pass but each layer's input."""
    for backbone in _backbones(model):
        # the new name since transformers 5.23; 4.x has the old one alone
        new = getattr(backbone, "activation_checkpointing_enable", None)
        (new or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_backbones(model: Method, device: torch.device) -> str | None:
    """Let torch.compile translate the backbones, in place: the weights keep their names.

    Returns None, or where this machine can't compile why not; the backbones are then left alone.
    """
    fault = _compiler_fault(device)
    if fault is None:
        for backbone in _backbones(model):
            backbone.compile(dynamic=True)
    return fault


def _compiler_fault(device: torch.device) -> str | None:
    """Return why a small function can't be compiled and run, None where it can."""
    unique = time.time_ns() % 1_000_000 / 7.0  # not one that an earlier call left in the cache
    try:
        torch.compile(lambda x: x * unique + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever compilers and their drivers raise
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return None


def _backbones(model: Method) -> Iterator[nn.Module]:
    for encoder in (model.image_encoder, model.text_encoder):
        backbone = getattr(encoder, "backbone", None)
        if isinstance(backbone, nn.Module):
            yield backbone
