"""What LAPS, the released SEPS and improved LAPS share: one network, one similarity, one loss."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.batch import Tokens
from lib.methods.base import Method
from lib.methods.flags import SLIMMING_FLAGS
from lib.model import kernels
from lib.model.alignment import best_affinities, mean_of_best
from lib.model.choice import PatchChoice
from lib.model.encoders import ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss, ratio_loss
from lib.model.slimming import (
    LapsNetwork,
    SlimmedImages,
    TextSummary,
    summarise_text,
    without_kernel,
)

OF_CAPTION = "cosine with the caption"  # a part of a patch's score


class LapsFamily(Method):
    """What LAPS, the released SEPS and improved LAPS share: one `LapsNetwork` and its ratio loss.

    `ratio_lambdas` weigh the kept share in the ratio loss, a constant under hard top-k.
    """

    also_reads = SLIMMING_FLAGS
    ratio_lambdas: ClassVar[tuple[float, float]] = (1.0, 0.0)
    score_range = (-0.2, 2.0)  # two means of leaky affinities

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
        dense_owner: str | None = None,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size, dense_owner)
        self.ratio_weight = ratio_weight
        self.detach_patches = detach_patches
        self.network = LapsNetwork(embed_size, image_encoder.num_patches, sparse_ratio, aggr_ratio)

    @staticmethod
    def shared_settings(args: argparse.Namespace) -> dict[str, Any]:
        """Return the constructor's keyword arguments that the whole family reads off the flags."""
        return {
            "embed_size": args.embed_size,
            "shard_size": args.shard_size,
            "sparse_ratio": args.sparse_ratio,
            "aggr_ratio": args.aggr_ratio,
            "ratio_weight": args.ratio_weight,
            "detach_patches": bool(args.detach_patches),
        }

    @property
    def may_leave_unused(self) -> bool:
        return self.detach_patches

    @property
    def is_fused(self) -> bool:
        learned = self.network.selection.control is None
        return learned and kernels.serves(self.network.head.scale)

    def prepare_images(self, images: Tokens) -> SlimmedImages:
        return self.network.prepare(self.patches_of(images), images.cls, fused=self.is_fused)

    def patches_of(self, images: Tokens) -> Tensor:
        """Return the patches (B_v, L, C), without gradient where the flag says so."""
        return images.local.detach() if self.detach_patches else images.local

    def prepare_texts(self, texts: Tokens) -> TextSummary:
        return summarise_text(texts.local, texts.mask)

    def score(self, images: SlimmedImages, texts: TextSummary) -> dict[str, Tensor]:
        masks = texts.word_mask.new_ones(1), texts.word_mask  # every token is real
        return {"similarity": mean_of_best(*self._best(images, texts, *masks), *masks)}

    def _best(
        self, images: SlimmedImages, texts: TextSummary, token_mask: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each word's best token and each token's best word, (B_v, T, M) and (B_v, T, N)."""
        if self.is_fused:
            best = self._fused_best(images, texts, word_mask)
            if best is not None:
                return best
            images = without_kernel(images)
        cosines = self.network.tokens(images, texts.embedding).products(texts.words)
        return best_affinities(cosines, token_mask, word_mask)

    def _fused_best(
        self, images: SlimmedImages, texts: TextSummary, word_mask: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        fixed = images.fixed
        return kernels.fused_matches(
            self.network.scores(images, texts.embedding, fused=True),
            images.aggregation.logits,
            images.patches,
            texts.words,
            word_mask,
            fixed,
            fixed.new_ones(fixed.shape[:2], dtype=torch.bool),
            self.network.kept,
            gram=images.aggregation.gram,
        )

    def patch_choice(self, images: Tokens, texts: Tokens) -> PatchChoice:
        prepared, embeddings = self.prepare_images(images), self.prepare_texts(texts).embedding
        scores, kept = self.network.select(prepared, embeddings)
        own = prepared.own[:, None].expand_as(scores)
        parts = {"cosine with the image": own, OF_CAPTION: scores - own}
        return PatchChoice({"sparse": kept}, {"sparse": scores, **parts})

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        losses = super().losses(images, texts, image_ids)
        share = losses["loss"].new_tensor(self.network.kept_share)
        ratio = ratio_loss(share, None, self.network.sparse_ratio, *self.ratio_lambdas)
        return {**losses, "loss": losses["loss"] + self.ratio_weight * ratio, "ratio": ratio}
