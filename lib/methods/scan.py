"""SCAN: stacked cross attention between words and patches."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from lib.batch import Rows, Tokens
from lib.methods.base import Method
from lib.methods.registry import register_method
from lib.model.alignment import NEGATIVE_SLOPE, masked_average
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss
from lib.model.precision import full_precision

TINY = 1e-8


@full_precision
def attended_cosine(
    cosines: Tensor, gram: Tensor, query_mask: Tensor, context_mask: Tensor, smooth: float
) -> Tensor:
    """Return the mean over queries of cos(query, its attended context), (b_v, b_t). SPEC 10.

    cosines (b_v, b_t, Q, N) of unit queries with unit context elements; gram (b_v | 1, b_t | 1,
    N, N), products among the context elements; the masks broadcast to (b_v, b_t, Q) and
    (b_v, b_t, N). The attended vector a = Σ w·c is never built: q·a = Σ w·(q·c), ‖a‖² = w'·gram·w.
    """
    attention = leaky_relu(cosines, NEGATIVE_SLOPE).masked_fill(~query_mask[..., None], 0)
    attention = normalize(attention, dim=2)  # over the queries, for each context element
    weights = (smooth * attention).masked_fill(~context_mask[..., None, :], -math.inf).softmax(3)
    dots = (weights * cosines).sum(3)  # (b_v, b_t, Q)
    squares = ((weights @ gram) * weights).sum(3)
    return masked_average(dots / squares.clamp(min=TINY).sqrt(), query_mask)


@dataclass
class UnitTokens(Rows):
    """Normalised patches or words."""

    unit: Tensor  # (B, N, C)
    mask: Tensor  # (B, N)
    gram: Tensor | None = None  # (B, N, N) products among them, where they are a context


@register_method("scan")
class SCAN(Method):
    """Stacked cross attention (ECCV 2018), SPEC 10: words query patches, patches words, or both.

    An image's [CLS] takes no part; a caption's [CLS] and [SEP] are words like any other.
    """

    accepts_regions = True
    score_range = (-1.0, 1.0)  # mean cosines

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        criterion: AlignmentLoss,
        *,
        shard_size: int = 64,
        direction: str = "t2i",
        lambda_t2i: float = 9.0,
        lambda_i2t: float = 4.0,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.directions = ("t2i", "i2t") if direction == "both" else (direction,)
        self.lambda_t2i = lambda_t2i
        self.lambda_i2t = lambda_i2t

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--scan_direction",
            default="t2i",
            choices=["t2i", "i2t", "both"],
            help="words query patches; patches query words; the mean of the two",
        )
        group.add_argument(
            "--scan_lambda_t2i", type=float, default=9.0, help="sharpness where words query"
        )
        group.add_argument(
            "--scan_lambda_i2t", type=float, default=4.0, help="sharpness where patches query"
        )

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> SCAN:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            shard_size=args.shard_size,
            direction=args.scan_direction,
            lambda_t2i=args.scan_lambda_t2i,
            lambda_i2t=args.scan_lambda_i2t,
        )

    def prepare_images(self, images: Tokens) -> UnitTokens:
        return self._unit_tokens(images, "t2i")

    def prepare_texts(self, texts: Tokens) -> UnitTokens:
        return self._unit_tokens(texts, "i2t")

    def _unit_tokens(self, tokens: Tokens, context_of: str) -> UnitTokens:
        unit = normalize(tokens.local, dim=-1)
        gram = unit @ unit.transpose(1, 2) if context_of in self.directions else None
        return UnitTokens(unit, tokens.mask, gram)

    def score(self, images: UnitTokens, texts: UnitTokens) -> dict[str, Tensor]:
        cosines = torch.einsum("tmc,vlc->vtml", texts.unit, images.unit)
        word_mask, patch_mask = texts.mask[None], images.mask[:, None]
        found = []
        if "t2i" in self.directions:
            gram = images.gram[:, None]
            found.append(attended_cosine(cosines, gram, word_mask, patch_mask, self.lambda_t2i))
        if "i2t" in self.directions:
            turned, gram = cosines.transpose(2, 3), texts.gram[None]
            found.append(attended_cosine(turned, gram, patch_mask, word_mask, self.lambda_i2t))
        return {"similarity": torch.stack(found).mean(0)}
