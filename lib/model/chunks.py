"""Bases of encoders, which take a large batch in chunks and keep of each but its features.

Gradient caching (Gao et al., "Scaling deep contrastive learning batch size under memory limited
setup", 2021): every chunk is encoded without a graph; the losses are those of the whole batch, and
so is the gradient at the features; then each chunk is encoded again, with a graph, and its part of
that gradient goes through it. It is exact, as an encoder's features of a row are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lib.model.precision import without_graph


class ChunkedEncoder(nn.Module):
    """Base of encoders; `rows_at_once` is the most rows that they are given at once, 0: any."""

    rows_at_once: int = 0

    def in_chunks(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Return `function(*rows)`, of this module's weights, with a row a row: (B, …).

        Of more than `rows_at_once` rows the backward pass computes each chunk again. The rows
        themselves get no gradient.
        """
        size = self.rows_at_once
        if not size or len(rows[0]) <= size:
            return function(*rows)
        learnt = [one for one in self.parameters() if one.requires_grad]
        if learnt and torch.is_grad_enabled():
            return _ComputedAgain.apply(function, size, rows, *learnt)
        return _encoded(function, _chunks(rows, size), len(rows[0]))


class BackboneEncoder(ChunkedEncoder):
    """An encoder whose backbone can be kept as it is: no gradient, no dropout."""

    backbone: nn.Module
    proj: nn.Module
    frozen: bool

    def freeze(self) -> None:
        """Keep the backbone's weights from now on; the projection goes on learning."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> BackboneEncoder:
        """Set training mode, which a frozen backbone never enters."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def projected(self, states: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Return the projection of `states(*rows)`, (B, N, C), in chunks where that is asked for.

        What a frozen backbone says is kept, and nothing of it is computed again.
        """
        if self.frozen:
            with torch.no_grad():
                kept = self.in_chunks(states, *rows)
            return self.proj(kept)
        return self.in_chunks(lambda *chunk: self.proj(states(*chunk)), *rows)


def _chunks(rows: Sequence[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(one.split(size) for one in rows), strict=True))


def _encoded(
    function: Callable[..., Tensor], chunks: list[tuple[Tensor, ...]], rows: int
) -> Tensor:
    """Return the features of all chunks, (rows, …), written where they stay: never there twice."""
    with without_graph(chunks[0][0].device):
        features = function(*chunks[0])
        whole, first = features.new_empty(rows, *features.shape[1:]), len(features)
        whole[:first] = features
        for chunk in chunks[1:]:
            features = function(*chunk)
            whole[first : first + len(features)] = features
            first += len(features)
    return whole


class _ComputedAgain(torch.autograd.Function):
    """One node of the graph: weights -> features. DDP sees the gradient of each weight once."""

    @staticmethod
    def forward(ctx, function, size: int, rows: tuple[Tensor, ...], *weights: Tensor) -> Tensor:
        ctx.function, ctx.chunks = function, _chunks(rows, size)
        ctx.save_for_backward(*weights)
        ctx.mode = _arithmetic(rows[0].device)
        ctx.states = []

        def noted(*chunk: Tensor) -> Tensor:
            ctx.states.append(_random_state(chunk[0].device))
            return function(*chunk)

        return _encoded(noted, ctx.chunks, len(rows[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        weights = ctx.saved_tensors
        total: list[Tensor | None] = [None] * len(weights)
        first = 0
        for chunk, state in zip(ctx.chunks, ctx.states, strict=True):
            with torch.enable_grad(), _as_before(state, ctx.mode, chunk[0].device):
                features = ctx.function(*chunk)
            part = gradient[first : first + len(features)]
            found = torch.autograd.grad(features, weights, part, allow_unused=True)
            for place, one in enumerate(found):
                if one is not None:
                    so_far = total[place]  # a copy: two weights may be given one tensor
                    total[place] = one.clone() if so_far is None else so_far.add_(one)
            first += len(features)
        return None, None, None, *total


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Return where the random numbers of the CPU, and of a CUDA device, are."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _arithmetic(device: torch.device) -> dict[str, Any]:
    """Return what autocast is at, as `torch.autocast` takes it."""
    return {
        "enabled": torch.is_autocast_enabled(device.type),
        "dtype": torch.get_autocast_dtype(device.type),
    }


@contextmanager
def _as_before(
    state: dict[str, Tensor], mode: dict[str, Any], device: torch.device
) -> Iterator[None]:
    """Give the block the random numbers and the arithmetic of then; what goes on is untouched."""
    devices = [device] if "cuda" in state else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, **mode):
        torch.set_rng_state(state["cpu"])
        if devices:
            torch.cuda.set_rng_state(state["cuda"], device)
        yield
