"""Improved LAPS: other global embeddings, fewer words, other similarities, flag by flag."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.laps_family import LapsFamily
from lib.methods.registry import register_method
from lib.model.alignment import attention_mean, threshold_mean
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss
from lib.model.slimming import SlimmedImages, TextSummary, WordSelection

SIMILARITIES = ("max", "attn", "thres")
STRATEGIES = ("ratio", "score")


@dataclass
class QueryingText(TextSummary):
    """A text whose words also query the tokens (`attn`), (B_t, M, C) each."""

    i2t: Tensor | None = None
    t2i: Tensor | None = None


@register_method("ilaps")
class ImprovedLAPS(LapsFamily):
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
        cls_as_global: bool = False,
        word_selection: WordSelection | None = None,
        similarity: str = "max",
        learnable_temperature: bool = False,
        score_threshold: float = 0.7,
        **shared: Any,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, embed_size=embed_size, **shared)
        self.cls_as_global = cls_as_global
        self.similarity_kind = similarity
        self.score_threshold = score_threshold
        self.word_selection = word_selection
        self.temperature: float | nn.Parameter = 1.0
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
        super().check_arguments(args)
        for flag, choices in (
            ("similarity_calc_method", (None, *SIMILARITIES)),
            ("token_selection_strategy", STRATEGIES),
        ):
            value = getattr(args, flag)
            if value not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise InputError(f"--{flag} {value}: choose one of {known}")

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
            **cls.shared_settings(args),
            cls_as_global=bool(args.use_cls_as_glob_embd),
            word_selection=selection,
            similarity=args.similarity_calc_method or "max",
            learnable_temperature=bool(args.use_learnable_temp),
            score_threshold=args.score_threshold,
        )

    @property
    def may_leave_unused(self) -> bool:
        return super().may_leave_unused or self.word_selection is not None

    @property
    def is_fused(self) -> bool:
        return self.similarity_kind == "max" and super().is_fused

    def prepare_images(self, images: Tokens) -> SlimmedImages:
        embeddings = images.cls[:, 0] if self.cls_as_global else None  # (B_v, C)
        patches = self.patches_of(images)
        return self.network.prepare(patches, images.cls, embeddings, fused=self.is_fused)

    def prepare_texts(self, texts: Tokens) -> QueryingText:
        made = QueryingText(**vars(super().prepare_texts(texts)))
        if self.cls_as_global:
            made.embedding = texts.local[:, 0].detach()
        if self.similarity_kind == "attn":
            made.i2t, made.t2i = self.i2t_attention(made.words), self.t2i_attention(made.words)
        if self.word_selection is not None:
            made.word_mask = self.word_selection(made.words, texts.mask)
        return made

    def score(self, images: SlimmedImages, texts: QueryingText) -> dict[str, Tensor]:
        if self.similarity_kind == "max":
            return super().score(images, texts)
        tokens, mask = self.network.tokens(images, texts.embedding), texts.word_mask
        if self.similarity_kind == "attn":
            queries = tokens.products(texts.i2t), tokens.products(texts.t2i)
            cosines = tokens.products(texts.words)
            return {"similarity": attention_mean(cosines, mask, *queries, self.temperature)}
        cosines, every = tokens.products(texts.words), mask.new_ones(1)
        return {"similarity": threshold_mean(cosines, every, mask, self.score_threshold)}
