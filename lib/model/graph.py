"""Relations among the images and captions of one batch: the instance graph of HREM."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, leaky_relu, normalize

from lib.batch import Tokens
from lib.model.alignment import NEGATIVE_SLOPE, largest, masked_average
from lib.model.precision import full_precision


def transformer_layer(channels: int, heads: int) -> nn.TransformerEncoderLayer:
    """Return a post-norm Transformer encoder layer with ReLU and ff = C. NOTE: no dropout."""
    return nn.TransformerEncoderLayer(channels, heads, channels, dropout=0.0, batch_first=True)


# --- relations ---------------------------------------------------------------------------------


@torch.no_grad()
def cross_matches(images: Tokens, texts: Tokens, topk: int, chunk: int = 64) -> Tensor:
    """Return how words find regions and regions find words, (B_v, B_t, 2, 1 + k), no gradient.

    [..., 0, :] is t2i, over words, [..., 1, :] is i2t, over regions: first the mean m of the best
    matches, then their k largest in descending order (0 where there are fewer). At most `chunk` x
    `chunk` pairs are worked on at once. Source: SPEC 10 (HREM, word-region A).
    """
    starts = range(0, len(texts), chunk)
    rows = []
    for first in range(0, len(images), chunk):
        part = images[first : first + chunk]
        columns = [_chunk_matches(part, texts[start : start + chunk], topk) for start in starts]
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)


def _chunk_matches(images: Tokens, texts: Tokens, topk: int) -> Tensor:
    return _matches(images.local, images.mask, texts.local, texts.mask, topk)


@full_precision
def _matches(
    regions: Tensor, region_mask: Tensor, words: Tensor, word_mask: Tensor, topk: int
) -> Tensor:
    cosines = torch.einsum("tmc,vnc->vtmn", normalize(words, dim=-1), normalize(regions, dim=-1))
    real = word_mask[None, :, :, None] & region_mask[:, None, None, :]  # (b_v, b_t, M, N)
    affinity = leaky_relu(cosines, NEGATIVE_SLOPE).masked_fill(~real, 0)
    found = []
    for dim, mask in ((2, word_mask[None]), (3, region_mask[:, None])):
        shares = normalize(affinity, dim=dim).masked_fill(~real, -math.inf)
        best = shares.amax(5 - dim)  # each word's best region, then each region's best word
        mask = mask.expand_as(best)
        mean = masked_average(best, mask)  # (b_v, b_t)
        found.append(torch.cat([mean[..., None], largest(best, mask, topk)[0]], dim=-1))
    return torch.stack(found, dim=2)


def closeness(first: Tensor, second: Tensor) -> Tensor:
    """Return exp(−‖x − y‖) of all rows, (B, C) and (B', C) -> (B, B')."""
    # the quick way, by matrix product, is off by 1e-3 where two rows are nearly the same
    return (-torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")).exp()


def connected(similarity: Tensor, threshold: float) -> Tensor:
    """Return which entries reach the int(columns · threshold)-th largest of their row, bool."""
    rank = max(1, int(similarity.shape[1] * threshold))
    return similarity >= similarity.topk(rank, dim=1).values[:, -1:]


def _blocks(i2i: Tensor, i2t: Tensor, t2i: Tensor, t2t: Tensor) -> Tensor:
    return torch.cat([torch.cat([i2i, i2t], dim=1), torch.cat([t2i, t2t], dim=1)])


# --- the graph ---------------------------------------------------------------------------------


class Related(NamedTuple):
    """What the graph makes of a batch."""

    images: Tensor  # (B, C) of length 1
    texts: Tensor  # (B, C) of length 1
    regulariser: Tensor  # scalar


class InstanceGraph(nn.Module):
    """All images and captions of a batch attend to each other along their relations.

    images and texts (B, C) of length 1, matches (B, B, 2, 1 + k) as `cross_matches` returns ->
    `Related`. Rows of a block matrix [[i2i, i2t], [t2i, t2t]] are who looks, columns who is seen.
    Source: Fu et al., "Learning semantic relationship among instances", CVPR 2023; SPEC 10 (HREM).
    """

    def __init__(
        self,
        embed_size: int,
        heads: int = 16,
        topk: int = 10,
        threshold: float = 0.5,
        mask_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.topk = topk
        self.threshold = threshold
        self.mask_weight = mask_weight
        self.t2i_mlp = _relevance_mlp(topk)
        self.i2t_mlp = _relevance_mlp(topk)
        self.attention = transformer_layer(embed_size, heads)

    @full_precision
    def forward(self, images: Tensor, texts: Tensor, matches: Tensor) -> Related:
        relevance = self.relevance(images, texts, matches)
        visible = self.connections(images, texts, matches)
        bias = (self.mask_weight * relevance).masked_fill(~visible, -math.inf)
        instances = torch.cat([images, texts])[None]  # (1, 2B, C)
        out = normalize(self.attention(instances, src_mask=bias)[0], dim=-1)  # (2B, C)
        seen, said = out.split([len(images), len(texts)])
        return Related(seen, said, _regulariser(relevance, images, texts))

    def relevance(self, images: Tensor, texts: Tensor, matches: Tensor) -> Tensor:
        """Return how much each instance means to each other one, (2B, 2B)."""
        means, tops = matches[..., 0], matches[..., 1:]  # (B, B, 2), (B, B, 2, k)
        t2i = self.t2i_mlp(tops[:, :, 0]).squeeze(-1) + means[:, :, 0]
        i2t = self.i2t_mlp(tops[:, :, 1]).squeeze(-1) + means[:, :, 1]
        return _blocks(closeness(images, images), i2t, t2i.T, closeness(texts, texts))

    def connections(self, images: Tensor, texts: Tensor, matches: Tensor) -> Tensor:
        """Return who sees whom, bool (2B, 2B)."""
        t2i, i2t = matches[:, :, 0, 0].T, matches[:, :, 1, 0]
        similarities = (images @ images.T, i2t, t2i, texts @ texts.T)
        return _blocks(*(connected(block, self.threshold) for block in similarities))


def _relevance_mlp(topk: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(topk, topk), nn.ReLU(), nn.Linear(topk, 1))


def _regulariser(relevance: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """Return KL(relevance ‖ closeness of embeddings) over images plus over captions.

    The embeddings only teach: the relevances learn.
    """
    size = len(images)
    near = closeness(images.detach(), texts.detach())  # (B, B)
    i2t, t2i = relevance[:size, size:], relevance[size:, :size]
    images_kl, texts_kl = (
        kl_div(taught.log_softmax(1), learnt.softmax(1), reduction="batchmean")
        for taught, learnt in ((near, i2t), (near.T, t2i))
    )
    return images_kl + texts_kl
