"""Improved LAPS: other global embeddings, fewer words, other similarities, flag by flag."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lib.alignment import attention_mean, max_mean, pair_affinity, threshold_mean
from lib.batch import Tokens
from lib.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.errors import InputError
from lib.losses import AlignmentLoss, ratio_loss
from lib.methods.base import Method, Prepared, check_slimming
from lib.methods.registry import register_method
from lib.slimming import LapsNetwork, WordSelection, summarise_text

SIMILARITIES = ("max", "attn", "thres")
STRATEGIES = ("ratio", "score")


@register_method("ilaps")
class ImprovedLAPS(Method):
    """Improved LAPS, SPEC 10; with every flag off it is LAPS.

    NOTE: the choice of words has no gradient in the official code either: the layer that scores
    them keeps its random weights.
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
        detach_patches: bool = False,
        cls_as_global: bool = False,
        word_selection: WordSelection | None = None,
        similarity: str = "max",
        learnable_temperature: bool = False,
        score_threshold: float = 0.7,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.ratio_weight = ratio_weight
        self.detach_patches = detach_patches
        self.cls_as_global = cls_as_global
        self.similarity_kind = similarity
        self.score_threshold = score_threshold
        self.network = LapsNetwork(embed_size, image_encoder.num_patches, sparse_ratio, aggr_ratio)
        self.word_selection = word_selection
        self.temperature = 1.0
        if similarity == "attn":
            self.i2t_attention = nn.Linear(embed_size, embed_size)
            self.t2i_attention = nn.Linear(embed_size, embed_size)
            if learnable_temperature:
                self.temperature = nn.Parameter(torch.ones(1, 1, 1))

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--use_cls_as_glob_embd", type=int, help="1: [CLS] is the global embedding"
        )
        group.add_argument("--use_token_selection", type=int, help="1: only chosen words count")
        group.add_argument(
            "--token_selection_strategy", default="ratio", help="ratio: the best; score: above 0"
        )
        group.add_argument("--token_selection_ratio", type=float, default=1.0, help="words kept")
        group.add_argument("--similarity_calc_method", help="max (default), attn or thres")
        group.add_argument("--use_learnable_temp", type=int, default=0, help="of attn")
        group.add_argument("--score_threshold", type=float, default=0.7, help="of thres")

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        check_slimming(args)
        for flag, choices in (
            ("similarity_calc_method", (None, *SIMILARITIES)),
            ("token_selection_strategy", STRATEGIES),
        ):
            value = getattr(args, flag)
            if value not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise InputError(f"--{flag} {value}: choose one of {known}")
        if not 0 <= args.token_selection_ratio <= 1:
            raise InputError(
                f"--token_selection_ratio {args.token_selection_ratio}: give a number in [0, 1]"
            )
        if args.score_threshold < 0:
            raise InputError(f"--score_threshold {args.score_threshold}: give 0 or more")

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> ImprovedLAPS:
        image_encoder = source.image()
        if args.use_cls_as_glob_embd and not image_encoder.has_cls:
            raise InputError(
                f"--use_cls_as_glob_embd 1: the image encoder --vit_type {args.vit_type} has no "
                "[CLS] token; choose a ViT, or leave the flag at 0"
            )
        selection = None
        if args.use_token_selection:
            selection = WordSelection(
                args.embed_size, args.token_selection_strategy, args.token_selection_ratio
            )
        return cls(
            image_encoder,
            source.text(),
            AlignmentLoss.from_args(args),
            embed_size=args.embed_size,
            shard_size=args.shard_size,
            sparse_ratio=args.sparse_ratio,
            aggr_ratio=args.aggr_ratio,
            ratio_weight=args.ratio_weight,
            detach_patches=bool(args.detach_patches),
            cls_as_global=bool(args.use_cls_as_glob_embd),
            word_selection=selection,
            similarity=args.similarity_calc_method or "max",
            learnable_temperature=bool(args.use_learnable_temp),
            score_threshold=args.score_threshold,
        )

    @property
    def may_leave_unused(self) -> bool:
        return self.detach_patches or self.word_selection is not None

    def prepare_images(self, images: Tokens) -> Prepared:
        patches = images.local.detach() if self.detach_patches else images.local  # (B_v, L, C)
        embeddings = images.cls[:, 0] if self.cls_as_global else None  # (B_v, C)
        return self.network.prepare(patches, images.cls, embeddings)

    def prepare_texts(self, texts: Tokens) -> Prepared:
        prepared = summarise_text(texts.local, texts.mask)
        if self.cls_as_global:
            prepared["global"] = texts.local[:, 0].detach()
        if self.similarity_kind == "attn":
            prepared["i2t"] = self.i2t_attention(prepared["words"])  # (B_t, M, C)
            prepared["t2i"] = self.t2i_attention(prepared["words"])
        if self.word_selection is not None:
            prepared["word_mask"] = self.word_selection(prepared["words"], texts.mask)
        return prepared

    def score(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        words, mask = texts["words"], texts["word_mask"]
        tokens = self.network.tokens(images, texts["global"])  # (B_v, T, N, C)
        if self.similarity_kind == "attn":
            queries = texts["i2t"], texts["t2i"]
            return {"similarity": attention_mean(tokens, words, mask, *queries, self.temperature)}
        affinity, every = pair_affinity(tokens, words), mask.new_ones(1)
        if self.similarity_kind == "thres":
            return {"similarity": threshold_mean(affinity, every, mask, self.score_threshold)}
        return {"similarity": max_mean(affinity, every, mask)}

    def kept_patches(self, images: Tokens, texts: Tokens) -> Tensor:
        embeddings = self.prepare_texts(texts)["global"]
        return self.network.select(self.prepare_images(images), embeddings)[1]

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        losses = super().losses(images, texts, image_ids)
        share = losses["loss"].new_tensor(self.network.kept_share)
        ratio = ratio_loss(share, None, self.network.sparse_ratio, 1.0, 0.0)
        return {**losses, "loss": losses["loss"] + self.ratio_weight * ratio, "ratio": ratio}
