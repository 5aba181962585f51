"""AVSE: two radial views of an image, block-wise best match, redundancy reduction between views."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lib.batch import Rows, Tokens
from lib.errors import InputError
from lib.methods.base import Method
from lib.methods.registry import register_method
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.image_backbones import pretrained_size
from lib.model.losses import AlignmentLoss
from lib.model.pooling import GPO, TokenHead, drop_tokens
from lib.model.precision import full_precision

VIEWS = 2
OFF_DIAGONAL_WEIGHT = 0.0051


# --- formulas ----------------------------------------------------------------------------------


def radial_order(centres: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the patches of a (rows, columns) grid by distance from each centre: (B,) -> (B, L).

    Centres and results are row-major patch numbers, the nearest patch first. NOTE: the official
    code ranks by exp(−4·distance), the same order until it underflows on a 24×24 grid.
    """
    rows, columns = grid
    patch = torch.arange(rows * columns, device=centres.device)
    down = patch // columns - (centres // columns)[:, None]  # (B, L)
    right = patch % columns - (centres % columns)[:, None]
    return (down.square() + right.square()).argsort(dim=1, stable=True)


@full_precision
def block_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Return Σ over text blocks of the best image block's dot product, (B_v, B_t). SPEC 10.

    images (B_v, I, b) and texts (B_t, J, b) hold unit blocks, see `unit_blocks`.
    """
    return torch.einsum("vib,tjb->vtij", images, texts).amax(2).sum(2)


def unit_blocks(embeddings: Tensor, block: int) -> Tensor:
    """Return embeddings (B, N) cut into unit vectors of `block` channels, (B, N / block, block)."""
    return normalize(normalize(embeddings, dim=-1).unflatten(-1, (-1, block)), dim=-1)


@full_precision
def cross_correlation_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return Σ(c_ii − 1)² + 0.0051·Σ_{i≠j} c_ij² of two views (B, C), c = E1ᵀE2 / B. SPEC 10.

    NOTE: as in the official code, each channel is divided by its L2 norm over the batch and c by B
    once more, so c_ii is at most 1/B; Barlow Twins standardises channels and can reach 1.
    """
    correlation = normalize(first, dim=0).T @ normalize(second, dim=0) / len(first)  # (C, C)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + OFF_DIAGONAL_WEIGHT * off_diagonal


# --- views of an image -------------------------------------------------------------------------


def cuts_into(encoder: ImageEncoder) -> bool:
    """Return whether views are cut between the embeddings and the blocks: ViT alone lets them."""
    return encoder.backbone.config.model_type == "vit"


def run_blocks(backbone: nn.Module, hidden: Tensor) -> Tensor:
    """Return what a ViT's blocks, without the final LayerNorm, make of any tokens (B, N, width).

    transformers 4 keeps the blocks in an `encoder`, transformers 5 in `layers` of the model itself.
    """
    if hasattr(backbone, "encoder"):
        return backbone.encoder(hidden).last_hidden_state
    for layer in backbone.layers:
        hidden = layer(hidden)
    return hidden


def view_tokens(encoder: ImageEncoder, pixels: Tensor, centres: Tensor, share: float) -> Tensor:
    """Return the unprojected tokens of radial views, (V·B, N, width), all of the first view first.

    Each view keeps int(share · tokens) patches, those nearest to its centre: centres (V, B) in
    [0, 1) say where in the row-major order it lies. A ViT runs its blocks on [CLS] and those; of
    other encoders, views are taken from the output. A large batch may go in chunks.
    """

    def encode(pixels: Tensor, places: Tensor) -> Tensor:
        views = _view_tokens(encoder, pixels, places.T, share)  # (V·b, N, width)
        return views.unflatten(0, (-1, len(pixels))).transpose(0, 1)

    return encoder.in_chunks(encode, pixels, centres.T).transpose(0, 1).flatten(0, 1)


def _view_tokens(encoder: ImageEncoder, pixels: Tensor, centres: Tensor, share: float) -> Tensor:
    hidden = _embed(encoder, pixels)  # (B, [CLS] + registers + L, width)
    patches = encoder.num_patches
    count = max(1, min(patches, int((encoder.has_cls + patches) * share)))
    numbers = (centres.flatten() * patches).long()  # (V·B,)
    chosen = radial_order(numbers, encoder.grid)[:, :count] + encoder.layout.first_patch
    if encoder.has_cls:
        chosen = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)
    repeated = hidden.repeat(len(centres), 1, 1)  # (V·B, N, width)
    views = repeated.gather(1, chosen[:, :, None].expand(-1, -1, hidden.shape[2]))
    return run_blocks(encoder.backbone, views) if cuts_into(encoder) else views


def _embed(encoder: ImageEncoder, pixels: Tensor) -> Tensor:
    """Return the tokens that views are taken from: before a ViT's blocks, after any other's."""
    if not cuts_into(encoder):
        return encoder.hidden(pixels)
    resized = tuple(pixels.shape[-2:]) != pretrained_size(encoder.backbone)
    return encoder.backbone.embeddings(encoder.normalise(pixels), interpolate_pos_encoding=resized)


# --- the method --------------------------------------------------------------------------------


@dataclass
class Blocks(Rows):
    """An embedding cut into unit blocks, see `unit_blocks`."""

    blocks: Tensor  # (B, N / block, block)


@register_method("avse")
class AVSE(Method):
    """Asymmetric visual-semantic embedding (AAAI 2025), SPEC 5 and 10.

    Images' Tokens are the two views' embeddings side by side, local (B_v, 1, 2C); captions' are
    (B_t, 1, C). View centres are drawn per image and view in training; in evaluation one pair of
    centres, fixed by `seed`, serves all images.

    Swin's windows need the whole grid, so views are taken from its output tokens, as from any other
    encoder's but ViT's. NOTE: for Swin the official code samples no views; then both are the same,
    and neither the asymmetry nor the cross-correlation term has anything to work on.
    """

    takes_features = False
    has_global_embedding = False  # an image's has two views, a caption's one

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        criterion: AlignmentLoss,
        *,
        embed_size: int,
        shard_size: int = 64,
        block: int = 256,
        keep_train: float = 0.8,
        keep_eval: float = 0.9,
        size_augment: bool = True,
        dropout: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(image_encoder, text_encoder, criterion, shard_size)
        self.block = block_size(embed_size, block)
        blocks = embed_size // self.block
        self.score_range = (-float(blocks), float(blocks))  # a cosine for each of the text's
        self.keep_train = keep_train
        self.keep_eval = keep_eval
        self.size_augment = size_augment
        self.seed = seed
        self.image_head = _uniform_linear(image_encoder.width, embed_size)
        self.image_pool = GPO()
        self.dropout = nn.Dropout(dropout)
        self.text_head = TokenHead(text_encoder.width, embed_size)
        self.text_pool = GPO()
        self.text_norm = nn.LayerNorm(embed_size)
        # the heads above take the place of these, which would be left without gradient
        image_encoder.proj = nn.Identity()
        text_encoder.proj = nn.Identity()
        if cuts_into(image_encoder):
            image_encoder.backbone.layernorm = nn.Identity()

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--avse_block",
            type=int,
            default=256,
            help="channels of a similarity block; --embed_size itself where that is smaller",
        )
        group.add_argument(
            "--avse_keep_train", type=float, default=0.8, help="share of tokens a view keeps"
        )
        group.add_argument(
            "--avse_keep_eval", type=float, default=0.9, help="the same in evaluation"
        )
        group.add_argument(
            "--avse_dropout", type=float, default=0.2, help="dropout of the words' features"
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        block_size(args.embed_size, args.avse_block)

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> AVSE:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            embed_size=args.embed_size,
            shard_size=args.shard_size,
            block=args.avse_block,
            keep_train=args.avse_keep_train,
            keep_eval=args.avse_keep_eval,
            size_augment=bool(getattr(args, "size_augment", 1)),
            dropout=args.avse_dropout,
            seed=getattr(args, "seed", 0),
        )

    # --- encoding ------------------------------------------------------------------------------

    def encode_images(
        self,
        pixels: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
        pixel_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return both views' embeddings as Tokens: local (B_v, 1, 2C), each view of length 1."""
        share = self.keep_train if self.training else self.keep_eval
        centres = self._view_centres(len(pixels), pixels.device)  # (2, B_v)
        views = view_tokens(self.image_encoder, pixels, centres, share)
        features = self.image_head(views)  # (2·B_v, N, C)
        mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        if self.training and self.size_augment:
            mask = drop_tokens(mask)
        embeddings = normalize(self.image_pool(features, mask), dim=-1)  # (2·B_v, C)
        return _one_token(torch.cat(embeddings.chunk(VIEWS), dim=1))

    def encode_texts(
        self,
        ids: Tensor,
        lengths: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return the captions' embeddings as Tokens: local (B_t, 1, C)."""
        words = self.text_encoder(ids, lengths)
        features = self.text_head(self.dropout(words.local), words.mask)  # (B_t, M, C)
        return _one_token(self.text_norm(self.text_pool(features, words.mask)))

    def _view_centres(self, images: int, device: torch.device) -> Tensor:
        """Return where each view's centre lies in the order of patches, (2, B_v) in [0, 1)."""
        if self.training:
            return torch.rand(VIEWS, images, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(VIEWS, 1, generator=generator).to(device).expand(-1, images)

    # --- similarity and losses -----------------------------------------------------------------

    def prepare_images(self, images: Tokens) -> Blocks:
        return Blocks(unit_blocks(images.local[:, 0], self.block))

    def prepare_texts(self, texts: Tokens) -> Blocks:
        return Blocks(unit_blocks(texts.local[:, 0], self.block))

    def score(self, images: Blocks, texts: Blocks) -> dict[str, Tensor]:
        return {"similarity": block_similarity(images.blocks, texts.blocks)}

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        similarity = self.gather(self.similarity(images, texts))
        alignment = self.criterion(similarity, image_ids)
        views = self.gather(images.local[:, 0])  # (B, 2C)
        correlation = cross_correlation_loss(*views.chunk(VIEWS, dim=1))
        return {
            "loss": alignment + correlation,
            "alignment": alignment.detach(),
            "cross_correlation": correlation.detach(),
        }


def block_size(embed_size: int, block: int) -> int:
    """Return the channels of a block, at most all; InputError where they do not divide."""
    if block < 1 or embed_size % min(block, embed_size):
        raise InputError(
            f"--avse_block {block} does not divide --embed_size {embed_size}: "
            "give one that does, or an --embed_size that is a multiple"
        )
    return min(block, embed_size)


def _one_token(embeddings: Tensor) -> Tokens:
    mask = embeddings.new_ones(len(embeddings), 1, dtype=torch.bool)
    return Tokens(embeddings[:, None], mask)


def _uniform_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    limit = math.sqrt(6 / (inputs + outputs))
    nn.init.uniform_(linear.weight, -limit, limit)
    nn.init.zeros_(linear.bias)
    return linear
