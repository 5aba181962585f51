"""CHAN: each word takes its one best patch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.batch import Rows, Tokens
from lib.methods.base import Method
from lib.methods.registry import register_method
from lib.model.alignment import masked_average
from lib.model.encoders import EncoderSource
from lib.model.losses import AlignmentLoss


@dataclass
class UnitTokens(Rows):
    """Normalised patches or words."""

    unit: Tensor  # (B, N, C)
    mask: Tensor  # (B, N)


@register_method("chan")
class CHAN(Method):
    """Mean over words of the best patch's cosine, the hard assignment of CHAN (CVPR 2023).

    An image's [CLS] takes no part; a caption's [CLS] and [SEP] are words like any other.
    """

    accepts_regions = True
    score_range = (-1.0, 1.0)  # mean cosines

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> CHAN:
        criterion = AlignmentLoss.from_args(args)
        return cls(source.image(), source.text(), criterion, args.shard_size)

    def prepare_images(self, images: Tokens) -> UnitTokens:
        return UnitTokens(normalize(images.local, dim=-1), images.mask)

    def prepare_texts(self, texts: Tokens) -> UnitTokens:
        return UnitTokens(normalize(texts.local, dim=-1), texts.mask)

    def score(self, images: UnitTokens, texts: UnitTokens) -> dict[str, Tensor]:
        cosines = torch.einsum("vlc,tmc->vtml", images.unit, texts.unit)
        hidden = ~images.mask[:, None, None]
        best = cosines.masked_fill(hidden, -torch.inf).amax(3)  # (b_v, b_t, M)
        # at least float32: half precision would round many means to ties
        best = best.to(torch.promote_types(best.dtype, torch.float32))
        return {"similarity": masked_average(best, texts.mask)}
