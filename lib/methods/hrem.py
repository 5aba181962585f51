"""HREM: fragments related within an image or caption, instances related within the batch."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.pooled import PooledMethod, dot_products
from lib.methods.registry import register_method
from lib.model.encoders import EncoderSource, ImageEncoder, RegionEncoder, TextEncoder
from lib.model.graph import InstanceGraph, cross_matches, transformer_layer
from lib.model.losses import AlignmentLoss
from lib.model.pooling import TokenHead, max_k_pool
from lib.model.precision import full_precision
from lib.model.slimming import masked_mean

POOLED_VALUES = 2  # k of max-k pooling
RESIDUAL = 0.8  # share of the features themselves in an embedding; the rest is their relations'
REGULARISER_WEIGHT = 10.0


class FragmentPool(nn.Module):
    """Fragments and their relations -> one embedding: (B, N, C), mask (B, N) -> (B, C), length 1.

    0.8 · max-k pooling of the fragments + 0.2 · mean of what a Transformer layer makes of them.
    """

    def __init__(self, embed_size: int, heads: int) -> None:
        super().__init__()
        self.relations = transformer_layer(embed_size, heads)

    def forward(self, fragments: Tensor, mask: Tensor) -> Tensor:
        related = self.relations(fragments, src_key_padding_mask=~mask)  # (B, N, C)
        return _mixed(fragments, related, mask)


@full_precision
def _mixed(fragments: Tensor, related: Tensor, mask: Tensor) -> Tensor:
    own = max_k_pool(fragments, mask, POOLED_VALUES)
    return normalize(RESIDUAL * own + (1 - RESIDUAL) * masked_mean(related, mask), dim=-1)


@register_method("hrem")
class HREM(PooledMethod):
    """Hierarchical relation modelling (CVPR 2023), SPEC 5 and 10.

    While the instance graph trains, Tokens also hand on the fragments it is built of. An image's
    fragments are precomputed regions, or a backbone's last hidden states without [CLS]; a caption's
    [CLS] and [SEP] are words like any.

    The graph joins in after `warmup` calls of `training_losses` in training mode; the count is part
    of the state. Evaluation never sees it.

    NOTE: there is no dropout beside the backbones', as in SPEC 10 and the recordings.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder | RegionEncoder,
        text_encoder: TextEncoder,
        criterion: AlignmentLoss,
        *,
        embed_size: int,
        shard_size: int = 64,
        heads: int = 16,
        topk: int = 10,
        threshold: float = 0.5,
        mask_weight: float = 1.0,
        warmup: int = 8000,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.warmup = warmup
        self.image_head = TokenHead(image_encoder.width, embed_size)
        image_encoder.proj = nn.Identity()  # the head takes its place
        self.image_pool = FragmentPool(embed_size, heads)
        self.text_pool = FragmentPool(embed_size, heads)
        self.graph = InstanceGraph(embed_size, heads, topk, threshold, mask_weight)
        self.register_buffer("trained", torch.zeros((), dtype=torch.long))

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--hrem_loss",
            default="trip",
            choices=["trip", "vse"],
            help="hrem's own --loss: distance-weighted sampling, as published, or hinge triplet",
        )
        group.add_argument(
            "--warmup", type=int, default=8000, help="steps before the instance graph joins in"
        )
        group.add_argument(
            "--mask_weight", type=float, default=1.0, help="of relevance as an attention bias"
        )
        group.add_argument(
            "--topk", type=int, default=10, help="best matches that make a relevance"
        )
        group.add_argument(
            "--threshold", type=float, default=0.5, help="share of a batch an instance is tied to"
        )
        group.add_argument("--nhead", type=int, default=16, help="attention heads")

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        if args.embed_size % args.nhead:
            raise InputError(
                f"--nhead {args.nhead} does not divide --embed_size {args.embed_size}: "
                "give one that does"
            )
        if args.loss not in ("vse", args.hrem_loss):
            raise InputError(
                f"--loss {args.loss} is not read by hrem: give --hrem_loss trip or vse instead"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> HREM:
        own_loss = argparse.Namespace(**{**vars(args), "loss": args.hrem_loss})
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(own_loss),
            embed_size=args.embed_size,
            shard_size=args.shard_size,
            heads=args.nhead,
            topk=args.topk,
            threshold=args.threshold,
            mask_weight=args.mask_weight,
            warmup=args.warmup,
        )

    @property
    def warm(self) -> bool:
        """Return True where the instance graph takes part in the next training step."""
        return int(self.trained) >= self.warmup

    @property
    def may_leave_unused(self) -> bool:
        return not self.warm

    # --- encoding ------------------------------------------------------------------------------

    def encode_images(self, *args, **kwargs) -> Tokens:
        """Return the images' embeddings as Tokens: local (B_v, 1, C) of length 1."""
        tokens = super().encode_images(*args, **kwargs)
        features = self.image_head(tokens.local, tokens.mask)  # (B_v, N, C)
        return self._embedded(features, tokens.mask, self.image_pool)

    def encode_texts(self, *args, **kwargs) -> Tokens:
        """Return the captions' embeddings as Tokens: local (B_t, 1, C) of length 1."""
        tokens = super().encode_texts(*args, **kwargs)
        return self._embedded(tokens.local, tokens.mask, self.text_pool)

    def _embedded(self, features: Tensor, mask: Tensor, pool: FragmentPool) -> Tokens:
        embedding = pool(features, mask)[:, None]  # (B, 1, C)
        fragments = Tokens(features.detach(), mask) if self.training and self.warm else None
        return Tokens(embedding, mask.new_ones(len(mask), 1), fragments=fragments)

    # --- losses -----------------------------------------------------------------

    def training_losses(self, *args, **kwargs) -> dict[str, Tensor]:
        """Return the loss dictionary as the base does; in training mode, count the call."""
        losses = super().training_losses(*args, **kwargs)
        if self.training:
            self.trained.add_(1)
        return losses

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        """Return L(I, T), and where Tokens carry fragments the graph's terms too.

        Those are L(I, T') + L(I', T) + L(I', T') and 10 · the regulariser.
        """
        seen, said = self.gather(images.local[:, 0]), texts.local[:, 0]  # (B, C) each
        alignment = self.criterion(dot_products(seen, said), image_ids)
        parts = {"loss": alignment, "alignment": alignment.detach()}
        if texts.fragments is None:
            return parts
        matches = cross_matches(
            images.fragments, texts.fragments, self.graph.topk, self.shard_size
        )  # this rank's images with all captions
        related = self.graph(seen, said, self.gather(matches))
        pairs = ((seen, related.texts), (related.images, said), (related.images, related.texts))
        crossed = sum(self.criterion(dot_products(*pair), image_ids) for pair in pairs)
        regulariser = REGULARISER_WEIGHT * related.regulariser
        return {
            "loss": alignment + crossed + regulariser,
            "alignment": alignment.detach(),
            "cross": crossed.detach(),
            "regulariser": regulariser.detach(),
        }
