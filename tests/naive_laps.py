"""LAPS and improved LAPS written from SPEC 3 and 10 pair by pair: the oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import leaky_relu

from tests.naive_seps import kept_indices, unit


def image_tokens(network, patches, cls, image_global, text_global):
    """[v_cls; aggregated; fused], normalised, of one image before one text."""
    scores = unit(patches) @ unit(image_global) + unit(patches) @ unit(text_global)
    scores = scores.detach()
    keep = kept_indices(scores, math.ceil(len(patches) * network.sparse_ratio))
    drop = [i for i in range(len(patches)) if i not in keep]
    logits = network.head.weight(patches[keep]) * network.head.scale[0, 0, 0]  # (K, N_c)
    tokens = [logits.softmax(0).T @ patches[keep]]
    if drop:
        tokens.append(unit(scores[drop].softmax(0) @ patches[drop])[None])
    tokens[0] = unit(tokens[0])
    if not drop:
        tokens.append(torch.zeros_like(patches[:1]))
    if cls is not None:
        tokens.insert(0, unit(cls))
    return torch.cat(tokens)


def max_similarity(affinity):
    """affinity (words, tokens)."""
    return affinity.max(1).values.mean() + affinity.max(0).values.mean()


def threshold_similarity(affinity, threshold):
    per_word = []
    for row in affinity:
        best = row.max()
        near = [value for value in row if value >= best - threshold * best.abs()]
        per_word.append(sum(near) / len(near))
    return sum(per_word) / len(per_word) + affinity.max(0).values.mean()


def attention_similarity(words, tokens, affinity, i2t, t2i, temperature):
    total = 0
    for_tokens, for_words = i2t(words), t2i(words)
    for n, token in enumerate(tokens):
        share = (for_tokens @ token / temperature).softmax(0)
        total = total + (share * affinity[:, n]).sum() / len(tokens)
    for m in range(len(words)):
        share = (tokens @ for_words[m] / temperature).softmax(0)
        total = total + (share * affinity[m]).sum() / len(words)
    return total


def kept_words(selection, words):
    """Positions of the words that stay; `words` normalised."""
    query = selection.attn_mat(words[0])
    scores = {m: float((query @ words[m]).detach()) for m in range(1, len(words))}
    if selection.strategy == "score":
        return [0] + [m for m, score in scores.items() if score > 0]
    count = math.ceil((len(words) - 1) * selection.ratio)
    return [0, *sorted(sorted(scores, key=lambda m: -scores[m])[:count])]


def text_similarity(model, patches, cls, words):
    """Similarity of one image with one text; padding already cut off."""
    patches = patches.detach() if model.detach_patches else patches
    image_global, text_global = patches.mean(0), words.mean(0)
    if getattr(model, "cls_as_global", False):
        image_global, text_global = cls[0], words[0]
    tokens = image_tokens(model.network, patches, cls, image_global, text_global)
    words = unit(words)
    if getattr(model, "word_selection", None) is not None:
        words = words[kept_words(model.word_selection, words)]
    affinity = leaky_relu(words @ tokens.T, 0.1)
    kind = getattr(model, "similarity_kind", "max")
    if kind == "thres":
        return threshold_similarity(affinity, model.score_threshold)
    if kind == "attn":
        attention = model.i2t_attention, model.t2i_attention
        temperature = torch.as_tensor(model.temperature).sum()  # a number, or a (1, 1, 1) parameter
        return attention_similarity(words, tokens, affinity, *attention, temperature)
    return max_similarity(affinity)


def matrix(model, images, texts):
    """The similarity matrix (B_v, B_t) of tokens; a dense text's similarity is added."""
    rows = []
    for i in range(len(images)):
        cls = None if images.cls is None else images.cls[i]
        row = []
        for j in range(len(texts)):
            sides = [texts] if texts.dense is None else [texts, texts.dense]
            row.append(
                sum(
                    text_similarity(model, images.local[i], cls, side.local[j][side.mask[j]])
                    for side in sides
                )
            )
        rows.append(torch.stack(row))
    return torch.stack(rows)
