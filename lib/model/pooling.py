"""Token features -> one embedding: pooling operators; BatchNorm over all ranks, and its head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lib.batch import length_mask
from lib.distributed import gather_rows, world_size

GPO_TEMPERATURE = 0.1
AUGMENT_RATE = 0.8  # share of rows that lose tokens in training
DROP_RATE = 0.2  # largest chance of a token to be lost


def max_k_pool(tokens: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return the mean of each channel's k largest real values: (B, N, C), (B, N) -> (B, C).

    A row with fewer than k real tokens averages those it has; one without any gives 0.
    """
    hidden = tokens.masked_fill(~mask[:, :, None], -math.inf)
    top = hidden.topk(min(k, tokens.shape[1]), dim=1).values  # (B, k, C)
    real = top > -math.inf
    return top.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)


def drop_tokens(mask: Tensor) -> Tensor:
    """Return the mask (B, N) after size augmentation; every row keeps a token that it had.

    With probability 0.8 a row draws u from (0.2, 1) and loses each token with probability 0.2·u.
    """
    strength = torch.rand(len(mask), 1, device=mask.device)
    strength = strength.masked_fill(strength < 1 - AUGMENT_RATE, 0)
    kept = mask & (torch.rand(mask.shape, device=mask.device) >= DROP_RATE * strength)
    return torch.where(kept.any(1, keepdim=True), kept, mask)


class GPO(nn.Module):
    """Generalised pooling operator: (B, N, C), mask (B, N) -> (B, C).

    Each channel's real values are sorted in descending order and summed with weights that depend on
    the position and on the number of real tokens alone. Parameter names are the official code's.
    Source: Chen et al., "Learning the best pooling strategy", CVPR 2021; SPEC 10 (AVSE).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            lengths = mask.sum(1)
            weights = self.weights(lengths, tokens.shape[1])  # (B, N)
            hidden = tokens.to(weights.dtype).masked_fill(~mask[:, :, None], -math.inf)
            rows = hidden.transpose(1, 2).contiguous()  # (B, C, N): what is sorted lies together
            ranked = rows.sort(dim=2, descending=True).values
            filled = length_mask(lengths, tokens.shape[1])[:, None]  # (B, 1, N)
            return torch.einsum("bn,bcn->bc", weights, ranked.masked_fill(~filled, 0))

    def weights(self, lengths: Tensor, width: int) -> Tensor:
        """Return the weights of the sorted positions, (B, width): rows sum to 1, 0 past a length.

        They are computed once for each different length, from 1 up.
        """
        sizes, row = lengths.clamp(min=1).unique(return_inverse=True)
        places = self._position_encoding(int(sizes[-1])).expand(len(sizes), -1, -1)
        packed = pack_padded_sequence(places, sizes.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=width
        )  # (sizes, width, 2·32)
        states = states.unflatten(2, (2, self.width)).mean(2)  # both directions averaged
        scores = self.linear(states).squeeze(-1) / GPO_TEMPERATURE
        scores = scores.masked_fill(~length_mask(sizes, width), -math.inf)
        return scores.softmax(1)[row]

    def _position_encoding(self, length: int) -> Tensor:
        """Return the sinusoidal encoding of positions 0…length−1, (length, width)."""
        weight = self.linear.weight
        steps = torch.arange(0, self.width, 2, device=weight.device, dtype=weight.dtype)
        rates = (steps * (-math.log(10_000.0) / self.width)).exp()  # (width / 2,)
        places = torch.arange(length, device=weight.device, dtype=weight.dtype)
        angles = places[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the rows of all ranks: (N, C) -> (N, C), N may differ from rank to rank.

    The state dict and, on one process, the values are those of nn.BatchNorm1d; on several, forward
    and gradient are those of one process on the global batch. A caller leaves padding out of N.
    NOTE: nn.SyncBatchNorm does the same on CUDA only, and counts gradients in another way than
    `lib.distributed` does.
    """

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normed rows; what `mask` (N, C) hides takes no part in the statistics."""
        if not self.training or (mask is None and world_size() == 1):
            return super().forward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.to(self.weight.dtype)
            hidden = None if mask is None else ~mask
            count = self._count(wide, mask)
            mean = self._global_sum(_without(wide, hidden)) / count.clamp(min=1)
            centred = _without(wide - mean, hidden)
            variance = self._global_sum(centred.square()) / count.clamp(min=1)
            self._track(mean.detach(), variance.detach(), count)
            normed = (wide - mean) * (variance + self.eps).rsqrt()
            return (normed * self.weight + self.bias).to(rows.dtype)

    def _count(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Return how many values all ranks have, (1,), or with a mask of each channel, (C,)."""
        if mask is not None:
            return self._global_sum(mask.to(rows.dtype))
        return gather_rows(rows.new_full((1,), len(rows)), [1] * world_size()).sum()

    @staticmethod
    def _global_sum(rows: Tensor) -> Tensor:
        return gather_rows(rows.sum(0, keepdim=True), [1] * world_size()).sum(0)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics of what was seen; their variance is the unbiased one."""
        self.num_batches_tracked.add_(1)
        share = self.momentum * (count > 0).to(mean.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)


def _without(rows: Tensor, hidden: Tensor | None) -> Tensor:
    return rows if hidden is None else rows.masked_fill(hidden, 0)


class TokenHead(nn.Module):
    """Linear + MLP with BatchNorm of each real token: (B, N, width), mask (B, N) -> (B, N, C).

    Padding becomes 0. HREM's regions and AVSE's words go through it, SPEC 10. NOTE: AVSE's official
    BatchNorm counts padding too; here it is left out, so that a row's length says nothing about its
    batch-mates.
    """

    def __init__(self, width: int, embed_size: int) -> None:
        super().__init__()
        inner = embed_size // 2
        self.linear = nn.Linear(width, embed_size)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner, bias=False),  # BatchNorm would cancel the bias
            GlobalBatchNorm1d(inner),
            nn.ReLU(),
            nn.Linear(inner, embed_size),
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        real = tokens[mask]  # (tokens of all rows, width)
        rows = self.linear(real) + self.mlp(real)
        features = rows.new_zeros(*mask.shape, rows.shape[-1])
        features[mask] = rows
        return features
