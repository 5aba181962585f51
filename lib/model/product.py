"""Matrix products on the CPU in native_product.c: PyTorch's may use half of a core's vectors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lib.model import compiled

SIZES = "rows columns depth left_row left_step right_column right_step out_row add".split()
ITEM = 4  # bytes of a float


class _Product(ctypes.Structure):
    """`Product` of native_product.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in ("left", "right", "out")),
    ]


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return left @ right without gradient, float32: (M, K), (K, N) -> (M, N).

    Either may be a transposed or strided view. `out`, whose columns lie side by side, is filled, or
    with `add` added to. Serves where `compiled.is_available()`, else PyTorch multiplies.
    """
    rows, columns = left.shape[0], right.shape[1]
    if out is None:
        out, add = left.new_empty(rows, columns), False
    if not _serves(left, right, out):
        with torch.no_grad():
            return out.addmm_(left, right, beta=1.0 if add else 0.0)
    if left.shape[1] != right.shape[0] or out.shape != (rows, columns) or out.stride(1) != 1:
        raise ValueError(f"{tuple(left.shape)} @ {tuple(right.shape)} into {tuple(out.shape)}")
    by_rows = rows >= columns  # the larger side is shared out to the threads
    jobs = []
    for first, last in compiled.shares(rows if by_rows else columns):
        part = slice(first, last)
        if by_rows:
            job = _product(left[part], right, out[part], add)
        else:
            job = _product(left, right[:, part], out[:, part], add)
        jobs.append((ctypes.byref(job),))
    compiled.call("multiply", jobs)
    return out


def _serves(*tensors: Tensor) -> bool:
    floats = all(one.is_cpu and one.dtype == torch.float32 for one in tensors)
    return floats and compiled.is_available()


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> _Product:
    return _Product(
        rows=out.shape[0],
        columns=out.shape[1],
        depth=left.shape[1],
        left_row=left.stride(0),
        left_step=left.stride(1),
        right_column=right.stride(1),
        right_step=right.stride(0),
        out_row=out.stride(0),
        add=int(add),
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
    )
