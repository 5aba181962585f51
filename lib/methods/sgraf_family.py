"""What SGR and SAF share: similarity vectors of every pair, reasoned upon, then one number."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lib.batch import Rows, Tokens
from lib.errors import InputError
from lib.methods.base import Method
from lib.model.encoders import EncoderSource, ImageEncoder, RegionEncoder, TextEncoder
from lib.model.losses import AlignmentLoss
from lib.model.precision import full_precision
from lib.model.reasoning import ImageSelfAttention, SelfAttention, SimilarityNodes, linear, unit

SHARED_FLAGS = tuple(
    "data_name lr_update module_name sim_dim sgraf_norm num_regions sgraf_dropout".split()
)
PRECOMP = "_precomp"  # what --data_name ends in
OWN_DEFAULTS = {  # of SGRAF's program, which --data_name stands for
    "precomp": 1,
    "text_encoder": "gru",
    "embed_size": 1024,
    "weight_decay": 0.0,
    "max_violation": True,
    "embedding_warmup_epochs": -1,
    "size_augment": 0,
}
DECAY_RATE = 0.1


def add_shared_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that both methods read, those of SGRAF's own program first."""
    group.add_argument(
        "--data_name",
        default=None,
        metavar="NAME_precomp",
        help="stands for --dataset NAME --precomp 1 --text_encoder gru --embed_size 1024 "
        "--weight_decay 0 --max_violation --embedding_warmup_epochs -1 --size_augment 0",
    )
    group.add_argument(
        "--lr_update",
        type=int,
        default=None,
        metavar="EPOCHS",
        help="stands for --decay_rate 0.1 and --lr_schedules at each multiple",
    )
    group.add_argument(
        "--module_name", default=None, choices=["SGR", "SAF"], help="must agree with --method"
    )
    group.add_argument("--sim_dim", type=int, default=256, help="width of a similarity vector")
    group.add_argument(
        "--sgraf_norm",
        default="region",
        choices=["region", "channel"],
        help="BatchNorm of the image's parts: one channel a region index, as released, or one a "
        "feature channel, which neither the order nor the number of regions matters to",
    )
    group.add_argument(
        "--num_regions", type=int, default=36, help="of an image, for --sgraf_norm region"
    )
    group.add_argument(
        "--sgraf_dropout", type=float, default=0.4, help="of the image's and the caption's whole"
    )


@dataclass
class WholeAndParts(Rows):
    """An image or a caption as one vector and as its parts, all of length 1."""

    whole: Tensor  # (B, C)
    parts: Tensor  # (B, N, C) regions, patches or words
    mask: Tensor  # (B, N)


class SimilarityReasoning(Method):
    """Base of SGR and SAF (Diao et al., AAAI 2021), SPEC 11.

    Tokens hold the parts as `local` and the whole as `cls`, both of length 1: the image's own [CLS]
    takes no part. All dropout is done there, so that a pair's score repeats. What comes of a pair's
    nodes (b_v, b_t, 1 + M, S) is `reasoning`'s; it gives vectors (b_v, b_t, S).
    """

    accepts_regions = True

    def __init__(
        self,
        image_encoder: ImageEncoder | RegionEncoder,
        text_encoder: TextEncoder | nn.Module,
        criterion: AlignmentLoss,
        *,
        embed_size: int,
        regions: int,
        sim_dim: int = 256,
        norm: str = "region",
        dropout: float = 0.4,
        shard_size: int = 64,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.image_attention = ImageSelfAttention(embed_size, regions, norm, dropout)
        self.text_attention = SelfAttention(embed_size, dropout)
        self.nodes = SimilarityNodes(embed_size, sim_dim)
        self.evaluate = linear(sim_dim, 1)
        if isinstance(image_encoder, RegionEncoder):
            nn.init.xavier_uniform_(image_encoder.proj.weight)
            nn.init.zeros_(image_encoder.proj.bias)

    @classmethod
    def defaults(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Return what --data_name and --lr_update stand for."""
        found: dict[str, Any] = {}
        if args.data_name is not None:
            dataset = args.data_name.removesuffix(PRECOMP)
            if dataset in ("", args.data_name):
                raise InputError(
                    f"--data_name {args.data_name}: give NAME{PRECOMP}, the folder of region "
                    "features, or --dataset NAME for images"
                )
            found = {"dataset": dataset, **OWN_DEFAULTS}
        if args.lr_update is not None and args.lr_update > 0:
            falls = range(args.lr_update, args.num_epochs, args.lr_update)
            found |= {"decay_rate": DECAY_RATE, "lr_schedules": list(falls)}
        return found

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        module = args.module_name
        if module is not None and module.lower() != cls.name:
            raise InputError(
                f"--module_name {module} is not --method {cls.name}: leave one of them out"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> SimilarityReasoning:
        image_encoder = source.image()
        return cls(
            image_encoder,
            source.text(),
            AlignmentLoss.from_args(args),
            regions=args.num_regions if args.precomp else image_encoder.num_patches,
            **cls.settings(args),
        )

    @classmethod
    def settings(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Return the constructor's keyword arguments that are read off the flags."""
        return {
            "embed_size": args.embed_size,
            "sim_dim": args.sim_dim,
            "norm": args.sgraf_norm,
            "dropout": args.sgraf_dropout,
            "shard_size": args.shard_size,
        }

    def encode_images(self, *args, **kwargs) -> Tokens:
        """Return the images' regions or patches and their whole as `cls` (B_v, 1, C)."""
        return _with_whole(super().encode_images(*args, **kwargs), self.image_attention)

    def encode_texts(self, *args, **kwargs) -> Tokens:
        """Return the captions' words and their whole as `cls` (B_t, 1, C)."""
        return _with_whole(super().encode_texts(*args, **kwargs), self.text_attention)

    def prepare_images(self, images: Tokens) -> WholeAndParts:
        return WholeAndParts(images.cls[:, 0], images.local, images.mask)

    def prepare_texts(self, texts: Tokens) -> WholeAndParts:
        return WholeAndParts(texts.cls[:, 0], texts.local, texts.mask)

    def pair_nodes(self, images: WholeAndParts, texts: WholeAndParts) -> Tensor:
        """Return the similarity vectors of all pairs, (b_v, b_t, 1 + M, S)."""
        seen, said = (images.whole, images.parts, images.mask), (texts.whole, texts.parts)
        return self.nodes(*seen, *said, texts.mask)

    @full_precision
    def concluded(self, vectors: Tensor) -> Tensor:
        """Return sigmoid(w · vector + b), (b_v, b_t, S) -> (b_v, b_t); in bf16 many would tie."""
        return self.evaluate(vectors).squeeze(-1).sigmoid()


def _with_whole(tokens: Tokens, attention: SelfAttention) -> Tokens:
    parts = unit(tokens.local)
    whole = attention(parts, tokens.mask)[:, None]
    return replace(tokens, local=parts, cls=whole)
