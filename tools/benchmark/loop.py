"""What our similarity is measured against: the official networks' way, caption by caption.

What the official LAPS network does (CVPR 2024, its repository's network of patch selection and
aggregation), and so does `laps_loop`, operation by operation:

- once a batch: all patches and all words are normalised, and the cosine of every patch with its
  image's mean is taken, without gradient;
- for every caption, with all images of the batch at once: the mean of its words is multiplied with
  the normalised patches; scores are sorted; kept and dropped patches are gathered; the aggregation
  network (LayerNorm, two linear layers, softmax, weighted sums) runs on the kept ones; [CLS],
  aggregated and fused tokens are normalised; the caption's words are repeated for each image and
  multiplied with them; leaky ReLU, maxima and means both ways.

The released SEPS network (`released_loop`) does so twice with the same aggregation network, for
every caption and for the dense text that comes with it, the five captions of an image one after
another with the same one, and adds the two similarities; patches are taken without gradient.

Nothing else is hoisted and nothing of this is done more often. Left out is what only the official
log reads: the mask of kept patches. The weights are our model's, so that both compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from lib.batch import Tokens
from lib.methods.laps_family import LapsFamily

SLOPE = 0.1


def laps_loop(model: LapsFamily, images: Tokens, texts: Tokens) -> Tensor:
    """Return the LAPS similarity matrix (B_v, B_t), SPEC 3, a column after another."""
    patches = images.local.detach() if model.detach_patches else images.local  # (B_v, L, C)
    kept = math.ceil(patches.shape[1] * model.network.sparse_ratio)
    unit_patches, unit_words = normalize(patches, dim=-1), normalize(texts.local, dim=-1)
    with torch.no_grad():
        own = (normalize(patches.mean(1, keepdim=True), dim=-1) * unit_patches).sum(-1)  # (B_v, L)
    columns = []
    for index, length in enumerate(texts.lengths.tolist()):
        with torch.no_grad():
            embedding = normalize(texts.local[index, :length].mean(0), dim=-1)  # (C,)
            scores = own + (embedding * unit_patches).sum(-1)
        local, fused = slim(patches, scores, kept, model.network.head)
        tokens = [local, fused] if images.cls is None else [images.cls, local, fused]
        words = unit_words[index, :length].expand(len(patches), -1, -1)  # (B_v, n, C)
        columns.append(max_mean(normalize(torch.cat(tokens, 1), dim=-1), words))
    return torch.stack(columns, 1)


def released_loop(model: LapsFamily, images: Tokens, texts: Tokens) -> Tensor:
    """Return the released SEPS network's similarity matrix, SPEC 4.1: captions and dense texts."""
    return laps_loop(model, images, texts) + laps_loop(model, images, texts.dense)


Loop = Callable[[LapsFamily, Tokens, Tokens], Tensor]
LOOPS: dict[str, Loop] = {"laps": laps_loop, "seps_released": released_loop}
# whose official network a method is measured against: there is none of SPEC 4's SEPS
PEERS = {"laps": "laps", "seps": "seps_released", "seps_released": "seps_released"}


def slim(patches: Tensor, scores: Tensor, kept: int, head) -> tuple[Tensor, Tensor]:
    """Return the aggregated tokens (B_v, N_c, C) and the fused one (B_v, 1, C) of one caption."""
    ranked, order = scores.sort(dim=1, descending=True)
    width = patches.shape[2]
    chosen = patches.gather(1, order[:, :kept, None].expand(-1, -1, width))  # (B_v, K, C)
    dropped = patches.gather(1, order[:, kept:, None].expand(-1, -1, width))  # (B_v, L − K, C)
    weights = (head.weight(chosen).transpose(1, 2) * head.scale).softmax(2)  # (B_v, N_c, K)
    share = ranked[:, kept:].softmax(1)[:, :, None].to(dropped.dtype)
    return torch.bmm(weights.to(chosen.dtype), chosen), (dropped * share).sum(1, keepdim=True)


def max_mean(tokens: Tensor, words: Tensor) -> Tensor:
    """Return the similarities of unit tokens (B_v, N, C) and one caption's words (B_v, n, C)."""
    affinity = leaky_relu(torch.bmm(words, tokens.transpose(1, 2).to(words.dtype)), SLOPE)
    return affinity.amax(2).mean(1) + affinity.amax(1).mean(1)
