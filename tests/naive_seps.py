"""SEPS written from SPEC 4 pair by pair, with loops and no batching: the oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import leaky_relu


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def stretched(x):
    spread = x.max() - x.min()
    return (x - x.min()) / spread if spread > 0 else torch.zeros_like(x)


def cosine_scores(patches, text):
    return stretched(unit(patches) @ unit(text)).detach()


def kept_indices(significance, k):
    values = significance.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return sorted(order[:k])


def branch(patches, significance, head, k):
    """Aggregated tokens, fused token or None, kept share, of one branch of one pair."""
    keep = kept_indices(significance, k)
    drop = [i for i in range(len(patches)) if i not in keep]
    logits = head.weight(patches[keep]) * head.scale[0, 0, 0]  # (K, N_c)
    weights = logits.softmax(0)
    tokens = weights.T @ patches[keep]
    fused = None
    if drop:
        fused = significance[drop].softmax(0) @ patches[drop]
    return tokens, fused, len(keep) / len(patches)


def relevance(module, values):
    top = values.sort(descending=True).values[: module.k]
    if module.kind == "mean":
        return torch.zeros((), dtype=values.dtype)
    if module.kind == "topk_mean":
        return top.mean()
    room = torch.zeros(module.k - len(top), dtype=values.dtype)
    return module.mlp(torch.cat([top, room]))[0]


def pair(model, patches, cls, words, dense_words):
    """Similarity and kept shares of one image and one caption; padding already cut off."""
    source = patches.detach() if model.detach_patches else patches
    beta = model.beta
    k = math.ceil(len(source) * model.sparse_ratio)
    s_p = model.patch_score.mlp(source)[:, 0].sigmoid()
    s_im = cosine_scores(source, source.mean(0))
    s_st = cosine_scores(source, words.mean(0))
    sparse = (1 - 2 * beta) * s_p + beta * (s_st + s_im)
    local, fused, kept_sparse = branch(source, sparse, model.sparse_head, k)
    tokens = [local] if fused is None else [local, fused[None]]
    kept_dense = None
    if dense_words is not None:
        s_dt = cosine_scores(source, dense_words.mean(0))
        dense = (1 - 2 * beta) * s_p + beta * (s_dt + s_im)
        dense_local, dense_fused, kept_dense = branch(source, dense, model.dense_head, k)
        tokens[0] = tokens[0] + dense_local
        if dense_fused is not None:
            tokens.append(dense_fused[None])
    if cls is not None:
        tokens.append(cls)
    affinity = leaky_relu(unit(torch.cat(tokens)) @ unit(words).T, 0.1)
    for_words, for_tokens = affinity.max(0).values, affinity.max(1).values
    similarity = (
        for_words.mean()
        + relevance(model.word_relevance, for_words)
        + for_tokens.mean()
        + relevance(model.token_relevance, for_tokens)
    )
    return similarity, kept_sparse, kept_dense


def matrix(model, images, texts):
    """The similarity matrix (B_v, B_t) of tokens, pair by pair."""
    rows = []
    for i in range(len(images)):
        row = []
        for j in range(len(texts)):
            words = texts.local[j][texts.mask[j]]
            owner = {"image": images, "caption": texts, None: None}[model.dense_owner]
            at = i if model.dense_owner == "image" else j
            dense = None if owner is None else owner.dense.local[at][owner.dense.mask[at]]
            cls = None if images.cls is None else images.cls[i]
            row.append(pair(model, images.local[i], cls, words, dense)[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)
