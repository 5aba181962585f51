"""VSE++: one embedding an image, one a caption, cosine."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import normalize

from lib.batch import Tokens
from lib.methods.pooled import PooledMethod
from lib.methods.registry import register_method
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss
from lib.model.pooling import GPO
from lib.model.slimming import masked_mean

Pooling = Callable[[Tensor, Tensor], Tensor]  # tokens (B, N, C), mask (B, N) -> (B, C)


@register_method("vse")
class VSE(PooledMethod):
    """Cosine of pooled patches and pooled words (VSE++, BMVC 2018; GPO pooling, CVPR 2021).

    An image's [CLS] is not pooled.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        criterion: AlignmentLoss,
        *,
        shard_size: int = 64,
        pool: str = "gpo",
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.image_pool = _pooling(pool)
        self.text_pool = _pooling(pool)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--vse_pool",
            default="gpo",
            choices=["gpo", "mean"],
            help="how patches and words become one embedding: generalised pooling, or the mean",
        )

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> VSE:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            shard_size=args.shard_size,
            pool=args.vse_pool,
        )

    def encode_images(self, *args, **kwargs) -> Tokens:
        """Return the images' embeddings as Tokens: local (B_v, 1, C) of length 1."""
        return _pooled(super().encode_images(*args, **kwargs), self.image_pool)

    def encode_texts(self, *args, **kwargs) -> Tokens:
        """Return the captions' embeddings as Tokens: local (B_t, 1, C) of length 1."""
        return _pooled(super().encode_texts(*args, **kwargs), self.text_pool)


def _pooling(kind: str) -> Pooling:
    if kind not in ("gpo", "mean"):
        raise ValueError(f"unknown pooling {kind!r}; known: gpo, mean")
    return GPO() if kind == "gpo" else masked_mean


def _pooled(tokens: Tokens, pool: Pooling) -> Tokens:
    embedding = normalize(pool(tokens.local, tokens.mask), dim=-1)
    return Tokens(embedding[:, None], tokens.mask.new_ones(len(tokens), 1))
