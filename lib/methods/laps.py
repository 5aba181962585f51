"""LAPS: patches chosen under the caption, mean-of-maxima patch-word similarity."""

from __future__ import annotations

import argparse

from torch import Tensor

from lib.alignment import max_mean, pair_affinity
from lib.batch import Tokens
from lib.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.losses import AlignmentLoss, ratio_loss
from lib.methods.base import Method, Prepared, check_slimming
from lib.methods.registry import register_method
from lib.slimming import LapsNetwork, summarise_text


@register_method("laps")
class LAPS(Method):
    """Linguistic-Aware Patch Slimming, SPEC 3 (Fu et al., CVPR 2024)."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        criterion: AlignmentLoss,
        *,
        embed_size: int,
        shard_size: int = 64,
        sparse_ratio: float = 0.5,
        aggr_ratio: float = 0.4,
        ratio_weight: float = 2.0,
        detach_patches: bool = False,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.ratio_weight = ratio_weight
        self.detach_patches = detach_patches
        self.network = LapsNetwork(embed_size, image_encoder.num_patches, sparse_ratio, aggr_ratio)

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        check_slimming(args)

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> LAPS:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            embed_size=args.embed_size,
            shard_size=args.shard_size,
            sparse_ratio=args.sparse_ratio,
            aggr_ratio=args.aggr_ratio,
            ratio_weight=args.ratio_weight,
            detach_patches=bool(args.detach_patches),
        )

    @property
    def may_leave_unused(self) -> bool:
        return self.detach_patches

    def prepare_images(self, images: Tokens) -> Prepared:
        patches = images.local.detach() if self.detach_patches else images.local  # (B_v, L, C)
        return self.network.prepare(patches, images.cls)

    def prepare_texts(self, texts: Tokens) -> Prepared:
        return summarise_text(texts.local, texts.mask)

    def score(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        tokens = self.network.tokens(images, texts["global"])  # (B_v, T, N, C)
        affinity = pair_affinity(tokens, texts["words"])  # (B_v, T, N, M)
        every = texts["word_mask"].new_ones(1)
        return {"similarity": max_mean(affinity, every, texts["word_mask"])}

    def kept_patches(self, images: Tokens, texts: Tokens) -> Tensor:
        embeddings = self.prepare_texts(texts)["global"]
        return self.network.select(self.prepare_images(images), embeddings)[1]

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        losses = super().losses(images, texts, image_ids)
        share = losses["loss"].new_tensor(self.network.kept_share)
        ratio = ratio_loss(share, None, self.network.sparse_ratio, 1.0, 0.0)
        return {**losses, "loss": losses["loss"] + self.ratio_weight * ratio, "ratio": ratio}
