"""Matrix products on the CPU in native_product.c: PyTorch's may use half of a core's vectors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from lib.model import compiled

SIZES = """batch rows columns depth left_batch right_batch out_batch left_row left_step right_column
right_step out_row add"""
ROWS_AT_ONCE = 4  # of `apply_layers`


class _Product(ctypes.Structure):
    """`Product` of native_product.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES.split()),
        *((name, ctypes.c_void_p) for name in ("left", "right", "out")),
    ]


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return left @ right without gradient: (M, K), (K, N) -> (M, N), or with a batch before.

    Any strides will do. `out`, whose columns lie side by side, is filled, or with `add` added to.
    Where this does not serve (`serves`) PyTorch multiplies.
    """
    if out is None:
        out, add = left.new_empty(*left.shape[:-1], right.shape[-1]), False
    if not serves(left, right, out):
        with torch.no_grad():
            product = left @ right
            return out.add_(product) if add else out.copy_(product)
    wide = [one if one.dim() == 3 else one[None] for one in (left, right, out)]
    if not _fits(*wide):
        raise ValueError(f"{tuple(left.shape)} @ {tuple(right.shape)} into {tuple(out.shape)}")
    sides = list(wide[2].shape)
    longest = sides.index(max(sides))  # of batch, rows, columns: shared out to the threads
    jobs = []
    for first, last in compiled.shares(sides[longest]):
        parts = [slice(None)] * 3
        parts[longest] = slice(first, last)
        batch, rows, columns = parts
        job = _product(wide[0][batch, rows], wide[1][batch, :, columns], wide[2][tuple(parts)], add)
        jobs.append((ctypes.byref(job),))
    compiled.call("multiply", jobs)
    return out


def serves(*tensors: Tensor) -> bool:
    """Return whether the C code multiplies such tensors: float32 on the CPU, no autocast."""
    floats = all(one.is_cpu and one.dtype == torch.float32 for one in tensors)
    other = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return floats and not other and compiled.is_available()


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return `multiply(left, right)` with gradient."""
    if not serves(left, right):
        return left @ right
    return _Matmul.apply(left, right)


class _Matmul(torch.autograd.Function):
    """`multiply` and its gradient, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return multiply(left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        needs_left, needs_right = ctx.needs_input_grad
        return (
            matmul(gradient, right.mT) if needs_left else None,
            matmul(left.mT, gradient) if needs_right else None,
        )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does, by `matmul`: (…, C) -> (…, C')."""
    if not serves(rows, weight):
        return torch.nn.functional.linear(rows, weight, bias)
    product = matmul(rows.reshape(-1, rows.shape[-1]), weight.T)
    product = product if bias is None else product + bias
    return product.view(*rows.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """`nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def with_compiled_linears(network: nn.Module) -> nn.Module:
    """Return the network, whose plain linear layers are `Linear` from now on; weights stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return network


def apply_layers(layers: nn.Sequential, rows: Tensor) -> Tensor:
    """Return layers(rows), linear layers by `linear`: (B, L, C) -> (B, L, C').

    Without gradient a few rows at a time: what lies between the layers stays near the caches.
    """
    if not serves(rows, *layers.parameters()):
        return layers(rows)
    if torch.is_grad_enabled():
        return _applied(layers, rows)
    return torch.cat([_applied(layers, part) for part in rows.split(ROWS_AT_ONCE)])


def _applied(layers: nn.Sequential, rows: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            rows = linear(rows, layer.weight, layer.bias)
        else:
            rows = layer(rows)
    return rows


def _fits(left: Tensor, right: Tensor, out: Tensor) -> bool:
    batches = len(left) == len(right) == len(out)
    inner = left.shape[2] == right.shape[1] and out.stride(2) == 1
    return batches and inner and out.shape[1:] == (left.shape[1], right.shape[2])


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> _Product:
    return _Product(
        batch=out.shape[0],
        rows=out.shape[1],
        columns=out.shape[2],
        depth=left.shape[2],
        left_batch=left.stride(0),
        right_batch=right.stride(0),
        out_batch=out.stride(0),
        left_row=left.stride(1),
        left_step=left.stride(2),
        right_column=right.stride(2),
        right_step=right.stride(1),
        out_row=out.stride(1),
        add=int(add),
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
    )
