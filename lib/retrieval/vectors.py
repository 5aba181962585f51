"""Global vectors: one of each image, and the query that finds the images a caption fits best.

The method's similarity is no product of two vectors. An image's vector holds what such a product
can be made of: its [CLS], the mean of its patches, the mean of its dense text where that is
matched. The query is a linear map of a caption's words; which map, is learnt from exact
similarities of some captions with some images (ridge regression), or without those only a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.batch import Tokens

RIDGE = 30.0  # on features of unit variance


def image_vectors(images: Tokens, matches_dense: bool = False) -> Tensor:
    """Return one vector an image, (B, D): its unit [CLS], mean patch and mean dense word in a row.

    What an image lacks is left out; a method that pools has its embedding alone.
    """
    parts = [_mean(images)]
    if images.cls is not None:
        parts.insert(0, normalize(images.cls[:, 0].float(), dim=-1))
    if matches_dense and images.dense is not None:
        parts.append(_mean(images.dense))
    return torch.cat(parts, 1)


def text_features(texts: Tokens) -> Tensor:
    """Return what a query is a map of, (B, F): the unit mean, first word and maximum of its words.

    A method that pools has its embedding alone.
    """
    if texts.local.shape[1] == 1:
        return _mean(texts)
    words = texts.local.float()
    largest = words.masked_fill(~texts.mask[:, :, None], -torch.inf).amax(1)
    parts = [_mean(texts), normalize(words[:, 0], dim=-1), normalize(largest, dim=-1)]
    return torch.cat(parts, 1)


def _mean(tokens: Tokens) -> Tensor:
    weights = tokens.mask[:, :, None].float()
    unit = normalize(tokens.local.float(), dim=-1) if tokens.local.shape[1] > 1 else tokens.local
    return normalize((unit * weights).sum(1), dim=-1)


@dataclass(frozen=True)
class QueryMap:
    """How a caption becomes the query of a shortlist; `matrix` (F + 1, D), None for the guess."""

    matrix: np.ndarray | None = None

    def __call__(self, texts: Tokens, images: Tokens) -> np.ndarray:
        """Return the query (B, D) of captions; `images` shows how image vectors are laid out."""
        if self.matrix is not None:
            features = text_features(texts).cpu().numpy()
            return (features @ self.matrix[:-1] + self.matrix[-1]).astype(np.float32)
        mean = _mean(texts)
        if images.local.shape[1] == 1:  # a whole fraction of an image's: AVSE's two views
            return mean.repeat(1, images.local.shape[2] // mean.shape[1]).cpu().numpy()
        # the mean patch is background: [CLS] is the better guess where there is one
        guess = [mean] if images.cls is None else [mean, torch.zeros_like(mean)]
        if images.dense is not None:
            guess.append(mean)
        return torch.cat(guess, 1).cpu().numpy()


def fit_query_map(vectors: np.ndarray, features: np.ndarray, scores: np.ndarray) -> QueryMap:
    """Return the map under which queries' products with image vectors come nearest to `scores`.

    vectors (N, D), features (T, F), scores (N, T): exact similarities. What a caption scores with
    all images alike tells nothing of their order and is taken out first.
    """
    images = (vectors - vectors.mean(0)) / _spread(vectors)
    texts = (features - features.mean(0)) / _spread(features)
    texts = np.column_stack([texts, np.ones(len(texts))])
    target = scores - scores.mean(0)
    left = np.linalg.solve(images.T @ images + RIDGE * np.eye(images.shape[1]), images.T @ target)
    weights = np.linalg.solve(texts.T @ texts + RIDGE * np.eye(texts.shape[1]), texts.T @ left.T)
    weights = weights / _spread(vectors)  # (F + 1, D), of plain image vectors
    # fold the standardising of features into a map of (features, 1)
    slopes = weights[:-1] / _spread(features)[:, None]
    constant = weights[-1] - features.mean(0) @ slopes
    return QueryMap(np.vstack([slopes, constant]))


def _spread(values: np.ndarray) -> np.ndarray:
    return values.std(0) + 1e-4
