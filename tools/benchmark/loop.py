"""What our similarity is measured against: SPEC 3 and 4 caption by caption, as the field does it.

Each caption is scored with all images of the batch before the next one: it chooses patches, which
are sorted and gathered, and the aggregation network runs on what it kept. The weights are our
model's, so that both compute the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from lib.batch import Tokens
from lib.methods.laps import LAPS
from lib.methods.seps import SEPS

SLOPE = 0.1


def laps_loop(model: LAPS, images: Tokens, texts: Tokens) -> Tensor:
    """Return the LAPS similarity matrix (B_v, B_t), SPEC 3, a column after another."""
    patches = images.local.detach() if model.detach_patches else images.local  # (B_v, L, C)
    kept = math.ceil(patches.shape[1] * model.network.sparse_ratio)
    with torch.no_grad():
        own = cosines(patches, patches.mean(1))  # (B_v, L)
    columns = []
    for index, length in enumerate(texts.lengths.tolist()):
        words = texts.local[index, :length]  # (n, C), the real ones
        with torch.no_grad():
            scores = own + cosines(patches, words.mean(0))
        local, fused = slim(patches, scores, kept, model.network.head)
        tokens = [local, fused] if images.cls is None else [images.cls, local, fused]
        affinity = word_affinity(torch.cat(tokens, 1), words)  # (B_v, n, N)
        columns.append(affinity.amax(2).mean(1) + affinity.amax(1).mean(1))
    return torch.stack(columns, 1)


def seps_loop(model: SEPS, images: Tokens, texts: Tokens) -> Tensor:
    """Return the SEPS similarity matrix (B_v, B_t), SPEC 4, a column after another.

    For the defaults of SPEC 4: top-k selection, dense texts that belong to the images and guide.
    Both branches run for every caption, though the dense one does not depend on it.
    """
    patches = images.local.detach() if model.detach_patches else images.local  # (B_v, L, C)
    kept = math.ceil(patches.shape[1] * model.sparse_ratio)
    with torch.no_grad():
        own = stretch(cosines(patches, patches.mean(1)))  # (B_v, L)
        real = images.dense.mask[:, :, None]
        dense = (images.dense.local * real).sum(1) / real.sum(1)  # (B_v, C)
    predicted = (1 - 2 * model.beta) * model.patch_score(patches) + model.beta * own
    columns = []
    for index, length in enumerate(texts.lengths.tolist()):
        words = texts.local[index, :length]  # (n, C)
        with torch.no_grad():
            from_caption = stretch(cosines(patches, words.mean(0)))
            from_dense = stretch(cosines(patches, dense))
        first = slim(patches, predicted + model.beta * from_caption, kept, model.sparse_head)
        second = slim(patches, predicted + model.beta * from_dense, kept, model.dense_head)
        tokens = [first[0] + second[0], first[1], second[1]]
        if images.cls is not None:
            tokens.insert(0, images.cls)
        affinity = word_affinity(torch.cat(tokens, 1), words)  # (B_v, n, N)
        for_words, for_tokens = affinity.amax(2), affinity.amax(1)
        columns.append(
            for_words.mean(1)
            + relevance(model.word_relevance, for_words)
            + for_tokens.mean(1)
            + relevance(model.token_relevance, for_tokens)
        )
    return torch.stack(columns, 1)


LOOPS = {"laps": laps_loop, "seps": seps_loop}


def cosines(patches: Tensor, embedding: Tensor) -> Tensor:
    """Return cosines of patches (B_v, L, C) with (C,) or with (B_v, C), a row each: (B_v, L)."""
    embedding = normalize(embedding, dim=-1)
    embedding = embedding[:, None] if embedding.dim() == 2 else embedding
    return (normalize(patches, dim=-1) * embedding).sum(-1)


def stretch(scores: Tensor) -> Tensor:
    """Return the scores of each row stretched to [0, 1]."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).eps)


def slim(patches: Tensor, scores: Tensor, kept: int, head) -> tuple[Tensor, Tensor]:
    """Return the aggregated tokens (B_v, N_c, C) and the fused one (B_v, 1, C) of one caption."""
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    width = patches.shape[2]
    chosen = patches.gather(1, order[:, :kept, None].expand(-1, -1, width))  # (B_v, K, C)
    dropped = patches.gather(1, order[:, kept:, None].expand(-1, -1, width))  # (B_v, L − K, C)
    weights = (head.weight(chosen) * head.scale).softmax(1).transpose(1, 2)  # (B_v, N_c, K)
    share = ranked[:, kept:].softmax(1)[:, :, None].to(dropped.dtype)
    return torch.bmm(weights.to(chosen.dtype), chosen), (dropped * share).sum(1, keepdim=True)


def word_affinity(tokens: Tensor, words: Tensor) -> Tensor:
    """Return leaky cosines of one caption's words (n, C) with (B_v, N, C): (B_v, n, N)."""
    words = normalize(words, dim=-1).expand(len(tokens), -1, -1)
    tokens = normalize(tokens, dim=-1)
    return leaky_relu(torch.bmm(words, tokens.transpose(1, 2).to(words.dtype)), SLOPE)


def relevance(module, values: Tensor) -> Tensor:
    """Return the mean of the k largest of each row, eq. 5's R as `--relevance topk_mean`."""
    return values.topk(min(module.k, values.shape[1]), dim=1).values.mean(1)
