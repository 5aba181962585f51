"""The released SEPS code: LAPS run on the caption and on a dense text, the similarities added."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from lib.alignment import max_mean, pair_affinity
from lib.batch import Tokens, length_mask
from lib.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.losses import AlignmentLoss, ratio_loss
from lib.methods.base import Method, Prepared, check_slimming
from lib.methods.registry import register_method
from lib.slimming import LapsNetwork, summarise_text


@register_method("seps_released")
class SEPSReleased(Method):
    """What the published SEPS checkpoints compute, SPEC 4.1.

    The dense text is that of the CAPTION's image: an oracle, never comparable with `image` or
    `none`. One LAPS network serves both texts.

    NOTE: `--detach_patches` is 1 by default here, as in the released code: image features learn
    through [CLS] alone, and a Swin encoder not at all.
    NOTE: its ratio loss has both λ at 1, a target that top-k selection can't reach: a constant.
    """

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
        detach_patches: bool = True,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size, "caption")
        self.ratio_weight = ratio_weight
        self.detach_patches = detach_patches
        self.network = LapsNetwork(embed_size, image_encoder.num_patches, sparse_ratio, aggr_ratio)

    @classmethod
    def wants_dense(cls, args: argparse.Namespace) -> str:
        return "caption"

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        check_slimming(args)

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> SEPSReleased:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            embed_size=args.embed_size,
            shard_size=args.shard_size,
            sparse_ratio=args.sparse_ratio,
            aggr_ratio=args.aggr_ratio,
            ratio_weight=args.ratio_weight,
            detach_patches=args.detach_patches is None or bool(args.detach_patches),
        )

    @property
    def may_leave_unused(self) -> bool:
        return self.detach_patches

    def _encode_dense(self, owner: str, ids: Tensor | None, lengths: Tensor | None):
        """Return the dense tokens, each different text encoded once: captions share images."""
        if owner != "caption" or ids is None:
            return super()._encode_dense(owner, ids, lengths)
        real = ids.masked_fill(~length_mask(lengths, ids.shape[1]), -1)
        first, row = _first_equal(real).unique(return_inverse=True)
        return super()._encode_dense(owner, ids[first], lengths[first])[row]

    def pair_maps(self, images: Tokens, texts: Tokens) -> dict[str, Tensor]:
        captions = super().pair_maps(images, Tokens(texts.local, texts.mask))
        first, row = _first_equal_text(texts.dense).unique(return_inverse=True)
        dense = super().pair_maps(images, texts.dense[first])
        return {key: values + dense[key][:, row] for key, values in captions.items()}

    def prepare_images(self, images: Tokens) -> Prepared:
        patches = images.local.detach() if self.detach_patches else images.local  # (B_v, L, C)
        return self.network.prepare(patches, images.cls)

    def prepare_texts(self, texts: Tokens) -> Prepared:
        return summarise_text(texts.local, texts.mask)

    def score(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        """Return the similarity of images with captions, or with dense texts."""
        tokens = self.network.tokens(images, texts["global"])  # (B_v, T, N, C)
        affinity = pair_affinity(tokens, texts["words"])  # (B_v, T, N, M)
        every = texts["word_mask"].new_ones(1)
        return {"similarity": max_mean(affinity, every, texts["word_mask"])}

    def kept_patches(self, images: Tokens, texts: Tokens) -> Tensor:
        """Return which patches each pair keeps under its caption, bool (B_v, B_t, L)."""
        embeddings = self.prepare_texts(texts)["global"]
        return self.network.select(self.prepare_images(images), embeddings)[1]

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        losses = super().losses(images, texts, image_ids)
        share = losses["loss"].new_tensor(self.network.kept_share)
        ratio = ratio_loss(share, share, self.network.sparse_ratio, 1.0, 1.0)
        return {**losses, "loss": losses["loss"] + self.ratio_weight * ratio, "ratio": ratio}


def _first_equal(keys: Tensor) -> Tensor:
    """Return for each row of `keys` (B, K) the index of the first row equal to it, (B,)."""
    groups, group = keys.unique(dim=0, return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = places.new_full((len(groups),), len(keys)).scatter_reduce(0, group, places, "amin")
    return first[group]


def _first_equal_text(dense: Tokens) -> Tensor:
    """Return for each text the index of one with exactly the same tokens, (B,).

    Candidates are found by the [CLS] word, then compared in full; one that differs stays alone.
    """
    words = dense.local.detach().masked_fill(~dense.mask[:, :, None], 0)
    candidate = _first_equal(words[:, 0])
    same = (words == words[candidate]).flatten(1).all(1)
    same &= (dense.mask == dense.mask[candidate]).all(1)
    return torch.where(same, candidate, torch.arange(len(dense), device=words.device))
