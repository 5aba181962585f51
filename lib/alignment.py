"""Patch tokens and words -> similarity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad

NEGATIVE_SLOPE = 0.1


def pair_affinity(tokens: Tensor, words: Tensor) -> Tensor:
    """Return leaky_relu of all dot products: (B_v, T, N, C), (T, M, C) -> (B_v, T, N, M).

    Both sides are normalised by the caller.
    """
    products = torch.einsum("vtnc,tmc->vtnm", tokens, words)
    return leaky_relu(
        products.float() if products.dtype in (torch.float16, torch.bfloat16) else products,
        NEGATIVE_SLOPE,
    )


def best_matches(affinity: Tensor, token_mask: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return each word's best token and each token's best word.

    affinity (B_v, T, N, M), token_mask broadcastable to (B_v, T, N), word_mask (T, M) ->
    (B_v, T, M) and (B_v, T, N); entries of masked words or tokens are meaningless.
    """
    for_words = affinity.masked_fill(~token_mask[..., None], -math.inf).amax(2)
    for_tokens = affinity.masked_fill(~word_mask[None, :, None, :], -math.inf).amax(3)
    return for_words, for_tokens


def masked_average(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the real entries of the last dimension."""
    mask = mask.expand_as(values)
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def largest(values: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest real entries in descending order and which of them are real.

    values (…, N), mask broadcastable -> two (…, k) tensors; where a row has fewer than k real
    entries the rest are 0 and marked False.
    """
    mask = mask.expand_as(values)
    width = values.shape[-1]
    top = values.masked_fill(~mask, -math.inf).topk(min(k, width), dim=-1).values
    real = top > -math.inf
    top = top.masked_fill(~real, 0)
    return pad(top, (0, k - top.shape[-1])), pad(real, (0, k - real.shape[-1]))


class Relevance(nn.Module):
    """R of SEPS eq. 5 on the k largest matches: values (…, N), mask -> (…,).

    `topk_mean`: their mean; `topk_mlp`: MLP(k → k → 1) of them in descending order, missing ones 0;
    `mean`: R = 0, which leaves the plain mean. The MLP's last bias is left out: it shifts every
    similarity alike, and no ranking or triplet loss sees it.
    """

    def __init__(self, kind: str, k: int) -> None:
        super().__init__()
        if kind not in ("topk_mean", "topk_mlp", "mean"):
            raise ValueError(f"unknown relevance {kind!r}; known: topk_mean, topk_mlp, mean")
        self.kind = kind
        self.k = k
        if kind == "topk_mlp":
            self.mlp = nn.Sequential(nn.Linear(k, k), nn.ReLU(), nn.Linear(k, 1, bias=False))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "mean":
            return values.new_zeros(values.shape[:-1])
        top, real = largest(values, mask, self.k)
        if self.kind == "topk_mean":
            return masked_average(top, real)
        return self.mlp(top.to(self.mlp[0].weight.dtype)).squeeze(-1)


def max_mean(affinity: Tensor, token_mask: Tensor, word_mask: Tensor) -> Tensor:
    """Return mean_words max_tokens A + mean_tokens max_words A, (B_v, T). LAPS, SPEC 3."""
    for_words, for_tokens = best_matches(affinity, token_mask, word_mask)
    return masked_average(for_words, word_mask) + masked_average(for_tokens, token_mask)


def relevance_aware(
    affinity: Tensor,
    token_mask: Tensor,
    word_mask: Tensor,
    word_relevance: Relevance,
    token_relevance: Relevance,
) -> Tensor:
    """Return mean(max A) + R(top-k of max A), both directions added, (B_v, T). SEPS eq. 5."""
    for_words, for_tokens = best_matches(affinity, token_mask, word_mask)
    return (
        masked_average(for_words, word_mask)
        + word_relevance(for_words, word_mask)
        + masked_average(for_tokens, token_mask)
        + token_relevance(for_tokens, token_mask)
    )
