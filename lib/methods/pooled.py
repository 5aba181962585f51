"""Methods that make one embedding of an image or a caption: similarity is their dot product."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib.batch import Rows, Tokens
from lib.methods.base import Method
from lib.model.precision import full_precision


@dataclass
class Embedding(Rows):
    """One embedding an image or a caption."""

    embedding: Tensor  # (B, C)


class PooledMethod(Method):
    """Base of methods whose Tokens hold one local token: `local` (B, 1, C), of length 1."""

    accepts_regions = True
    score_range = (-1.0, 1.0)  # cosines: embeddings are of norm 1
    scores_repeat = False  # one product a pair: choosing pairs would cost more than it spares

    def prepare_images(self, images: Tokens) -> Embedding:
        return Embedding(images.local[:, 0])

    def prepare_texts(self, texts: Tokens) -> Embedding:
        return Embedding(texts.local[:, 0])

    def score(self, images: Embedding, texts: Embedding) -> dict[str, Tensor]:
        return {"similarity": dot_products(images.embedding, texts.embedding)}


@full_precision
def dot_products(images: Tensor, texts: Tensor) -> Tensor:
    """Return all dot products of (b_v, C) with (b_t, C), (b_v, b_t); in bf16 many would tie."""
    return images @ texts.T
