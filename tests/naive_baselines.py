"""SCAN, CHAN and the dense match pair by pair, from SPEC 4.2 and 10: the oracle of the tests."""

from __future__ import annotations

import torch
from torch.nn.functional import leaky_relu

from tests.naive_seps import unit


def by_pairs(images, texts, pair):
    """The matrix of `pair(image's real tokens, caption's real tokens)`, one pair at a time."""
    rows = []
    for image, real in zip(images.local, images.mask, strict=True):
        captions = zip(texts.local, texts.mask, strict=True)
        rows.append(torch.stack([pair(image[real], text[words]) for text, words in captions]))
    return torch.stack(rows)


def attended(queries, context, smooth):
    """SCAN: the mean over queries of the cosine with what they attend to, query by query."""
    attention = leaky_relu(unit(context) @ unit(queries).T, 0.1)  # (N, Q)
    attention = attention / attention.norm(dim=1, keepdim=True)
    cosines, context = [], unit(context)
    for q, query in enumerate(queries):
        weights = (smooth * attention[:, q]).exp()
        cosines.append(unit(query) @ unit((weights / weights.sum()) @ context))
    return sum(cosines) / len(cosines)


def scan_matrix(model, images, texts):
    """SCAN with the model's directions and sharpness."""

    def pair(patches, words):
        ways = {
            "t2i": lambda: attended(words, patches, model.lambda_t2i),
            "i2t": lambda: attended(patches, words, model.lambda_i2t),
        }
        return sum(ways[one]() for one in model.directions) / len(model.directions)

    return by_pairs(images, texts, pair)


def chan_matrix(model, images, texts):
    """CHAN: the mean over words of the best patch."""

    def pair(patches, words):
        every = unit(patches)
        return sum((every @ unit(word)).max() for word in words) / len(words)

    return by_pairs(images, texts, pair)


def dense_matrix(model, images, texts):
    """Best words both ways between dense text and caption (`--dense_match max_mean`)."""

    def pair(dense, words):
        cosines = unit(dense) @ unit(words).T
        return cosines.max(0).values.mean() + cosines.max(1).values.mean()

    return by_pairs(images, texts, pair)


def one_by_one(model, images, texts):
    """The model's own score of each pair alone, padding cut off: for methods without an oracle."""
    rows = []
    for i in range(len(images)):
        texts_alone = (texts[j : j + 1].trimmed() for j in range(len(texts)))
        rows.append(torch.cat([model.similarity(images[i : i + 1], one) for one in texts_alone], 1))
    return torch.cat(rows)
