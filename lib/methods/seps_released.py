"""The released SEPS code: LAPS run on the caption and on a dense text, the similarities added."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.batch import Tokens, length_mask
from lib.methods import pairs
from lib.methods.laps_family import OF_CAPTION, LapsFamily
from lib.methods.registry import register_method
from lib.model.choice import PatchChoice
from lib.model.encoders import EncoderSource
from lib.model.losses import AlignmentLoss
from lib.model.slimming import SlimmedImages

WHOLE_TEXT = 512  # word pieces: all that BERT reads


@register_method("seps_released")
class SEPSReleased(LapsFamily):
    """What the published SEPS checkpoints compute, SPEC 4.1.

    The dense text is that of the CAPTION's image: an oracle, never comparable with `image` or
    `none`. One LAPS network serves both texts.

    NOTE: `--detach_patches` is 1 by default here, as in the released code: image features learn
    through [CLS] alone, and a Swin encoder not at all.
    NOTE: its ratio loss has both λ at 1, a target that top-k selection can't reach: a constant.
    """

    ratio_lambdas = (1.0, 1.0)
    score_range = (-0.4, 4.0)  # LAPS twice

    @classmethod
    def wants_dense(cls, args: argparse.Namespace) -> str:
        return "caption"

    @classmethod
    def dense_words(cls, args: argparse.Namespace, training: bool = True) -> int:
        """Return where the released code cuts dense texts: nowhere in training, else as captions.

        Unless `--max_dense_word` says otherwise.
        """
        if args.max_dense_word is not None:
            return super().dense_words(args, training)
        return WHOLE_TEXT if training else args.max_word

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> SEPSReleased:
        settings = cls.shared_settings(args)
        settings["detach_patches"] = args.detach_patches is None or bool(args.detach_patches)
        criterion = AlignmentLoss.from_args(args)
        return cls(source.image(), source.text(), criterion, dense_owner="caption", **settings)

    def _encode_dense(self, owner: str, ids: Tensor | None, lengths: Tensor | None):
        """Return the dense tokens, each different text encoded once: captions share images."""
        if owner != "caption" or ids is None:
            return super()._encode_dense(owner, ids, lengths)
        real = ids.masked_fill(~length_mask(lengths, ids.shape[1]), -1)
        first, row = _first_equal(real).unique(return_inverse=True)
        return super()._encode_dense(owner, ids[first], lengths[first])[row]

    def leave_out_dense(self) -> None:
        self.dense_owner = None  # what is left is LAPS on the caption

    def patch_choice(self, images: Tokens, texts: Tokens) -> PatchChoice:
        caption = super().patch_choice(images, texts)
        if texts.dense is None:
            return caption
        dense = super().patch_choice(images, texts.dense)
        scores = {"sparse": caption.scores["sparse"], "dense": dense.scores["sparse"]}
        parts = {**caption.scores, "cosine with the dense text": dense.scores[OF_CAPTION]}
        kept = {**caption.kept, "dense": dense.kept["sparse"]}
        return PatchChoice(kept, {**scores, **parts})

    def bucketed(self, texts: Tokens) -> CaptionsAndDense | pairs.TextBuckets:
        if texts.dense is None:
            return super().bucketed(texts)
        first, row = _first_equal_text(texts.dense).unique(return_inverse=True)
        captions = pairs.bucketed(self, Tokens(texts.local, texts.mask))
        return CaptionsAndDense(captions, pairs.bucketed(self, texts.dense[first]), row)

    def prepared_maps(
        self, images: SlimmedImages, texts: CaptionsAndDense | pairs.TextBuckets
    ) -> pairs.Maps:
        if isinstance(texts, pairs.TextBuckets):
            return super().prepared_maps(images, texts)
        captions = pairs.all_pairs(self, images, texts.captions)
        dense = pairs.all_pairs(self, images, texts.dense)
        return {key: values + dense[key][:, texts.row] for key, values in captions.items()}

    def pair_scores(
        self, images: SlimmedImages, texts: Tokens, rows: Tensor, columns: Tensor
    ) -> Tensor:
        captions = super().pair_scores(images, texts, rows, columns)
        return captions + super().pair_scores(images, texts.dense, rows, columns)


@dataclass
class CaptionsAndDense:
    """Captions and the different dense texts among theirs, both prepared; `row` (B_t,) of each."""

    captions: pairs.TextBuckets
    dense: pairs.TextBuckets
    row: Tensor

    def __len__(self) -> int:
        return len(self.captions)


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
