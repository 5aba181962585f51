"""What D2S-VSE and its released code share: two stages, one embedding a side, a frozen teacher."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.base import Method
from lib.methods.pooled import Embedding, PooledMethod
from lib.model.decoder import CROSS_HEADS, DECODER_HEADS, PromptAttention, PromptDecoder
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss
from lib.model.pooling import GPO, TokenHead, drop_tokens
from lib.model.precision import full_precision
from lib.model.reasoning import linear, unit

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on

LONGEST_DENSE = 512  # word pieces of a dense text: BERT's positions are the only limit
SHARED_FLAGS = tuple(
    "pretrain distill weight_path use_decoder num_tokens decoder_depth gpo distill_loss"
    " no_res_embed d2s_dropout".split()
)


def add_shared_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of D2S-VSE's own program."""
    group.add_argument(
        "--pretrain",
        action="store_true",
        help="stage 1: align each training image with its dense text",
    )
    group.add_argument(
        "--distill",
        action="store_true",
        help="stage 2: align images with captions, the dense text as a frozen teacher; with "
        "neither flag captions alone are trained on",
    )
    group.add_argument(
        "--weight_path", default=None, metavar="FILE", help="stage 1's model_best.pth"
    )
    group.add_argument(
        "--use_decoder",
        action="store_true",
        help="the prompt tokens go through Transformer blocks with the words, in the place of one "
        "cross attention",
    )
    group.add_argument("--num_tokens", type=int, default=4, help="learnt prompt tokens")
    group.add_argument("--decoder_depth", type=int, default=4, help="Transformer blocks")
    group.add_argument(
        "--gpo", action="store_true", help="pool the decoder's tokens with GPO, not their mean"
    )
    group.add_argument(
        "--distill_loss",
        default="cos",
        choices=["cos", "l2"],
        help="distance to the teacher's embedding: 1 - cosine, or mean squared difference",
    )
    group.add_argument(
        "--no_res_embed",
        action="store_true",
        help="the prompt takes the place of the caption's embedding instead of adding to it",
    )
    group.add_argument(
        "--d2s_dropout", type=float, default=0.2, help="dropout of the words before their head"
    )


class CaptionHead(nn.Module):
    """Words of a text encoder -> (features (B, M, C), embedding (B, C)).

    Features are those of the positions `seen` (B, M), of which BatchNorm's statistics are too; the
    embedding is the LayerNorm of the real words' generalised pooling.
    """

    def __init__(self, width: int, embed_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.features = TokenHead(width, embed_size)
        self.pool = GPO()
        self.norm = nn.LayerNorm(embed_size)

    def forward(self, words: Tokens, seen: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.dropout(words.local), seen)
        return features, self.norm(self.pool(features, words.mask))


class Teacher(nn.Module):
    """A copy of stage 1's text side, without gradient."""

    def __init__(self, encoder: nn.Module, head: CaptionHead) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)


@full_precision
def distillation(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return how far captions (B, C) are from their teachers (B, C), a scalar. SPEC 11.

    `cos`: 1 − the mean cosine; `l2`: the mean over all entries of the squared difference.
    """
    if kind == "l2":
        return (student - teacher).square().mean()
    return 1 - torch.cosine_similarity(student, teacher, dim=1).mean()


class DenseToSparse(PooledMethod):
    """Base of D2S-VSE and its released form (ICCV 2025), SPEC 11.

    Tokens hold one local token: an image's of length 1, a caption's as it is, for the teacher's
    sake. In training, stage 2's captions carry the teacher's embedding of their image's dense text
    as `dense`; evaluation reads none.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder | nn.Module,
        text_encoder: TextEncoder | nn.Module,
        criterion: AlignmentLoss,
        *,
        embed_size: int,
        prompt: Callable[[], nn.Module] | None = None,
        residual: bool = True,
        distill_loss: str = "cos",
        size_augment: bool = True,
        dropout: float = 0.2,
        shard_size: int = 64,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.residual = residual
        self.distill_loss = distill_loss
        self.size_augment = size_augment
        # the heads below take the place of the projections
        image_encoder.proj = nn.Identity()
        text_encoder.proj = nn.Identity()
        self.image_head = linear(image_encoder.width, embed_size)
        self.image_pool = GPO()
        self.text_head = CaptionHead(text_encoder.width, embed_size, dropout)
        self.prompt = self.teacher = None
        if prompt is not None:
            self.prompt = prompt()
            self.teacher = Teacher(text_encoder, self.text_head)

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        if args.pretrain and args.distill:
            raise InputError("--pretrain and --distill are two stages: give one of them at a time")
        if args.distill and not args.weight_path:
            raise InputError(
                "--distill goes on from stage 1: add --weight_path RUN/model_best.pth of a run "
                "with --pretrain"
            )
        heads = DECODER_HEADS if args.use_decoder else CROSS_HEADS
        if args.distill and args.embed_size % heads:
            raise InputError(
                f"--embed_size {args.embed_size}: the prompt's {heads} attention heads do not "
                "divide it; give a multiple"
            )
        if args.gpo and not args.use_decoder:
            raise InputError("--gpo pools the decoder's tokens: add --use_decoder")

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> Self:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            embed_size=args.embed_size,
            prompt=_prompt_of(args) if args.distill else None,
            residual=not args.no_res_embed,
            distill_loss=args.distill_loss,
            size_augment=bool(getattr(args, "size_augment", 1)),
            dropout=args.d2s_dropout,
            shard_size=args.shard_size,
        )

    @classmethod
    def trains_on_dense(cls, args: argparse.Namespace) -> bool:
        return args.pretrain or args.distill

    @classmethod
    def pairs_from_dense(cls, args: argparse.Namespace) -> bool:
        return args.pretrain

    @classmethod
    def starts_from(cls, args: argparse.Namespace) -> str | None:
        return args.weight_path if args.distill else None

    @classmethod
    def dense_words(cls, args: argparse.Namespace, training: bool = True) -> int:
        return args.max_dense_word or LONGEST_DENSE

    def start_from(self, other: Method) -> None:
        """Take the encoders of stage 1; the text side becomes the teacher too."""
        if not isinstance(other, DenseToSparse):
            raise InputError(f"--weight_path holds a {other.name} model, not one of d2s")
        for name in ("image_encoder", "image_head", "image_pool", "text_encoder", "text_head"):
            getattr(self, name).load_state_dict(getattr(other, name).state_dict())
        self.teacher.encoder.load_state_dict(other.text_encoder.state_dict())
        self.teacher.head.load_state_dict(other.text_head.state_dict())

    # --- encoding ------------------------------------------------------------------------------

    def encode_images(self, *args, **kwargs) -> Tokens:
        """Return the images' embeddings as Tokens: local (B_v, 1, C) of length 1."""
        tokens = super().encode_images(*args, **kwargs)
        hidden, mask = tokens.local, tokens.mask
        if tokens.cls is not None:  # a token like any other here
            hidden = torch.cat([tokens.cls, hidden], dim=1)
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        if self.training and self.size_augment:
            mask = drop_tokens(mask)
        return _one_token(unit(self.image_pool(self.image_head(hidden), mask)))

    def encode_texts(
        self,
        ids: Tensor,
        lengths: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return the captions' embeddings as Tokens: local (B_t, 1, C), of any length.

        In training, stage 2's carry what the teacher makes of the dense text as `dense`.
        """
        words = self.text_encoder(*self.padded(ids, lengths))
        seen = self.seen(words.mask)
        features, embedding = self.text_head(words, seen)
        if self.prompt is not None:
            prompt = self.scaled(self.prompt(features, seen))
            embedding = embedding + prompt if self.residual else prompt
        tokens = _one_token(embedding)
        if self.teacher is not None and self.training and dense_ids is not None:
            tokens.dense = _one_token(self._taught(dense_ids, dense_lengths))
        return tokens

    @torch.no_grad()
    def _taught(self, ids: Tensor, lengths: Tensor) -> Tensor:
        words = self.teacher.encoder(*self.padded(ids, lengths))
        return self.teacher.head(words, self.seen(words.mask))[1]

    def padded(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids (B, M) and lengths as the text encoder gets them."""
        return ids, lengths

    def seen(self, mask: Tensor) -> Tensor:
        """Return which positions (B, M) the BatchNorm counts and the prompt reads."""
        return mask

    def scaled(self, prompt: Tensor) -> Tensor:
        """Return the prompt (B, C) as it is added."""
        return prompt

    # --- similarity and losses -----------------------------------------------------------------

    def prepare_texts(self, texts: Tokens) -> Embedding:
        return Embedding(unit(texts.local[:, 0]))

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        """Return the alignment loss, and in stage 2 the distance to the teacher beside it."""
        losses = super().losses(images, texts, image_ids)
        if self.teacher is None:
            return losses
        if texts.dense is None:
            raise ValueError(f"{self.name} learns from a dense text of each image: pass dense_ids")
        distance = distillation(texts.local[:, 0], texts.dense.local[:, 0], self.distill_loss)
        loss = losses["loss"] + distance
        return {**losses, "loss": loss, "distillation": distance.detach()}


def _prompt_of(args: argparse.Namespace) -> Callable[[], nn.Module]:
    shape = (args.embed_size, args.num_tokens)
    if args.use_decoder:
        return lambda: PromptDecoder(*shape, args.decoder_depth, args.gpo)
    return lambda: PromptAttention(*shape)


def _one_token(embeddings: Tensor) -> Tokens:
    mask = embeddings.new_ones(len(embeddings), 1, dtype=torch.bool)
    return Tokens(embeddings[:, None], mask)
