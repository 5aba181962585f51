"""Dense text against captions, without a pixel: how much of a result is text against text."""

from __future__ import annotations

import argparse
from typing import ClassVar

from torch import Tensor

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.base import Method
from lib.methods.registry import register_method
from lib.model.alignment import DenseMatch, MatchRows
from lib.model.encoders import EncoderSource, TextEncoder
from lib.model.losses import AlignmentLoss


@register_method("dense_text")
class DenseText(Method):
    """The term of `--dense_match` alone, unweighted: an image is its dense text. SPEC 4.2.

    Images' Tokens are the words of their dense texts: local (B_v, M_d, C), cls None.
    """

    uses_pixels: ClassVar[bool] = False
    also_reads = ("dense_match",)

    def __init__(
        self,
        text_encoder: TextEncoder,
        criterion: AlignmentLoss,
        *,
        shard_size: int = 64,
        match: str = "max_mean",
    ) -> None:
        super().__init__(None, text_encoder, criterion, shard_size, dense_owner="image")
        self.match = DenseMatch(match)
        self.score_range = (-2.0, 2.0) if match == "max_mean" else (-1.0, 1.0)

    @classmethod
    def wants_dense(cls, args: argparse.Namespace) -> str | None:
        return "image"

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        if args.dense_match == "sentence":
            raise InputError(
                "--dense_match sentence leaves dense_text nothing to train; `python -m "
                "tools.text_baseline --encoder NAME` measures that match alone"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> DenseText:
        return cls(
            source.text(),
            AlignmentLoss.from_args(args),
            shard_size=args.shard_size,
            match="max_mean" if args.dense_match == "none" else args.dense_match,
        )

    def encode_images(
        self,
        pixels: Tensor | None = None,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
        pixel_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return the tokens of the images' dense texts: local (B_v, M_d, C); pixels go unread."""
        return self._encode_dense("image", dense_ids, dense_lengths)

    def prepare_images(self, images: Tokens) -> MatchRows:
        return self.match.prepare(images)

    def prepare_texts(self, texts: Tokens) -> MatchRows:
        return self.match.prepare(texts)

    def score(self, images: MatchRows, texts: MatchRows) -> dict[str, Tensor]:
        return {"similarity": self.match(images, texts)}
