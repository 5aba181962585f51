"""What an index keeps of each image, as one record a row of a .npy file: float16 or int8."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.errors import InputError

STORES = ("float16", "int8")
SCALE = ":scale"  # ends the name of the field with an int8 field's scales
NESTED = "."  # between the names of rows within rows


def flatten(tensors: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of `Rows.tensors()` without nesting, names joined by a dot."""
    flat = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}{NESTED}"))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Return what `flatten` was given."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *rooms, last = name.split(NESTED)
        room = nested
        for one in rooms:
            room = room.setdefault(one, {})
        room[last] = value
    return nested


def pack(tensors: dict[str, Tensor], store: str, channels: int) -> np.ndarray:
    """Return tensors with a row an image as one structured array, (B,).

    Floating fields become float16, those of one number a patch float32; with `store` int8 the
    features (B, N, `channels`) of patches are int8 with a float16 scale for each. Raises InputError
    where float16 has no room.
    """
    arrays = {}
    for name, tensor in tensors.items():
        values = tensor.detach().cpu()
        if not values.is_floating_point():
            arrays[name] = values.numpy()
        elif values.dim() < 3:  # small, and among them the scores that choose patches
            arrays[name] = values.float().numpy()
        elif store == "int8" and values.dim() == 3 and values.shape[-1] == channels:
            arrays[name], arrays[name + SCALE] = _quantise(values.float())
        else:
            arrays[name] = _half(values, name)
    kinds = [(name, one.dtype, one.shape[1:]) for name, one in arrays.items()]
    # aligned, so that PyTorch reads a field where it lies
    records = np.empty(len(next(iter(arrays.values()))), dtype=np.dtype(kinds, align=True))
    for name, one in arrays.items():
        records[name] = one
    return records


def _half(values: Tensor, name: str) -> np.ndarray:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise InputError(
            f"the model gives {name} values that float16 has no room for, or that are not numbers: "
            "its checkpoint can't be searched with"
        )
    return half.numpy()


def _quantise(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return (B, N, C) as int8 and the (B, N, 1) float16 that multiplies it."""
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=6e-8)
    # the rounded scale is the one that will multiply
    scale = torch.from_numpy(_half(scale, "a scale")).clamp(min=6e-8)
    whole = (values / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return whole.numpy(), scale.numpy()


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the records of all parts; fields of unequal width are padded with zeros."""
    kinds = []
    for name in parts[0].dtype.names:
        fields = [part.dtype[name] for part in parts]
        shape = tuple(max(sides) for sides in zip(*(one.shape for one in fields), strict=True))
        kinds.append((name, fields[0].base, shape))
    dtype = np.dtype(kinds, align=True)
    if all(part.dtype == dtype for part in parts):
        return np.concatenate(parts)
    whole = np.zeros(sum(map(len, parts)), dtype=dtype)
    start = 0
    for part in parts:
        for name in part.dtype.names:
            inner = (slice(side) for side in part.dtype[name].shape)
            place = (slice(start, start + len(part)), *inner)
            whole[name][place] = part[name]
        start += len(part)
    return whole


def unpack(records: np.ndarray) -> dict[str, Tensor]:
    """Return the fields as tensors, floating ones in float32."""
    tensors = {}
    for name in records.dtype.names:
        if name.endswith(SCALE):
            continue
        values = _tensor(records[name])
        if name + SCALE in records.dtype.names:
            values = values.float() * _tensor(records[name + SCALE]).float()
        tensors[name] = values.float() if values.is_floating_point() else values.contiguous()
    return tensors


def _tensor(field: np.ndarray) -> Tensor:
    """Return a field as a tensor on the same memory, or on a copy where it lies unevenly."""
    even = all(stride % field.itemsize == 0 for stride in field.strides)
    return torch.from_numpy(field if even else np.ascontiguousarray(field))


class RecordFile:
    """Records in a file, memory-mapped at the first use; what was read is given back at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: np.memmap | None = None

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return copies of some records. Raises InputError where the file is damaged."""
        records = self._records()
        taken = records[np.asarray(rows)]
        self._advise("MADV_DONTNEED")  # stays in the system's cache, not in this process
        return np.asarray(taken)

    def prefetch(self, rows: np.ndarray) -> None:
        """Have the system read some records, all at once, before they are taken one by one."""
        records = self._records()
        size = records.dtype.itemsize
        firsts = records.offset % mmap.ALLOCATIONGRANULARITY + rows * size
        firsts -= firsts % mmap.PAGESIZE
        for first in firsts.tolist():
            self._advise("MADV_WILLNEED", first, size + mmap.PAGESIZE)

    def close(self) -> None:
        """Give the map back; the next `take` makes it anew."""
        self._map = None

    def _records(self) -> np.memmap:
        if self._map is None:
            try:
                self._map = np.lib.format.open_memmap(self.path, mode="r")
            except FileNotFoundError:
                raise InputError(
                    f"{self.path} is gone, the index was changed meanwhile: open it again"
                ) from None
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{self.path} can't be read ({error}); remove its folder and index again"
                ) from None
        return self._map

    def _advise(self, advice: str, *where: int) -> None:
        """Tell the system of the map, where both know the advice."""
        raw = getattr(self._map, "_mmap", None)
        if raw is not None and hasattr(mmap, advice):
            raw.madvise(getattr(mmap, advice), *where)
