"""What a method is: tokens of images, tokens of captions, a similarity, losses."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lib.batch import Batch, Rows, Tokens
from lib.distributed import gather_rows, gather_tokens
from lib.errors import InputError
from lib.methods import pairs
from lib.methods.options import MethodOptions
from lib.model.choice import PatchChoice
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss, GlobalLoss
from lib.model.slimming import masked_mean


class Method(MethodOptions, nn.Module):
    """Base of all methods; a subclass is one file and one `@register_method`.

    A subclass writes `score` for one chunk of pairs; what depends on the image or caption alone
    goes into `prepare_images` and `prepare_texts`, done once. The flags are `MethodOptions`' part.
    """

    dense_gradient: bool = True  # False where the dense text only chooses: its graph is spared
    scores_repeat: bool = True  # False: scored again they differ, or it spares nothing
    is_fused: bool = False  # True while a kernel scores the pairs (kernels.serves)
    may_leave_unused: bool = False  # True where a step can leave a parameter without gradient
    score_range: tuple[float, float] | None = None  # of a similarity, where it has bounds

    def __init__(
        self,
        image_encoder: ImageEncoder | nn.Module | None,
        text_encoder: TextEncoder | nn.Module,
        criterion: AlignmentLoss,
        shard_size: int = 64,
        dense_owner: str | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder: Any = image_encoder  # None where no pixels are read
        self.text_encoder = text_encoder
        self.criterion = criterion
        self.shard_size = shard_size
        self.dense_owner = dense_owner
        self.global_loss: GlobalLoss | None = None  # of --global_weight, whatever the method

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> Method:
        """Return the method that `args` describes; the only place that sees the Namespace."""
        raise NotImplementedError

    def start_from(self, other: Method) -> None:
        """Take the first weights of the model in the checkpoint that `starts_from` names."""
        raise NotImplementedError

    @property
    def protocol(self) -> str:
        """Return the evaluation protocol of SPEC 8: image, none or oracle."""
        return {"image": "image", "caption": "oracle", None: "none"}[self.dense_owner]

    def set_hard_negatives(self, hard: bool) -> None:
        """Use the hardest negative of each row and column instead of the sum over all."""
        self.criterion.hard_negatives = hard
        if self.global_loss is not None:
            self.global_loss.criterion.hard_negatives = hard

    def set_alignment_scale(self, scale: float) -> None:
        """Multiply the alignment loss, and nothing beside it, by `scale` (embedding warm-up)."""
        self.criterion.scale = scale

    def encode_images(
        self,
        pixels: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
        pixel_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return the images' tokens: local (B_v, L, C), mask, cls, and dense words where given."""
        lengths = () if pixel_lengths is None else (pixel_lengths,)  # regions have them
        tokens = self.image_encoder(pixels, *lengths)
        return replace(tokens, dense=self._encode_dense("image", dense_ids, dense_lengths))

    def encode_texts(
        self,
        ids: Tensor,
        lengths: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return the captions' tokens: local (B_t, M, C), mask, and dense words where given."""
        tokens = self.text_encoder(ids, lengths)
        return replace(tokens, dense=self._encode_dense("caption", dense_ids, dense_lengths))

    def encode_image_batch(self, batch: Batch) -> Tokens:
        """Return `encode_images` of a batch; a dense text in it counts where images own theirs."""
        dense = batch.dense_ids, batch.dense_lengths
        return self.encode_images(batch.pixels, *dense, batch.pixel_lengths)

    def encode_text_batch(self, batch: Batch) -> Tokens:
        """Return `encode_texts` of a batch; a dense text in it counts where captions own it."""
        return self.encode_texts(batch.ids, batch.lengths, batch.dense_ids, batch.dense_lengths)

    def _encode_dense(self, owner: str, ids: Tensor | None, lengths: Tensor | None):
        """Return the dense text's tokens where `owner` is who this method gives it to."""
        if self.dense_owner != owner:
            return None
        if ids is None:
            raise ValueError(f"{self.name} reads a dense text of each {owner}: pass dense_ids")
        with nullcontext() if self.dense_gradient else pairs.without_graph(ids.device):
            return self.text_encoder(ids, lengths)

    def leave_out_dense(self) -> None:
        """Go on as under --dense_side none; InputError where the similarity needs dense texts."""
        if self.dense_owner is not None:
            raise InputError(f"a model of {self.name} can't do without them")

    def global_embeddings(self, tokens: Tokens) -> Tensor:
        """Return one embedding an image or caption, the mean of its real tokens, (B, C)."""
        return masked_mean(tokens.local, tokens.mask)

    def prepare_images(self, images: Tokens) -> Rows:
        """Return what `score` needs of images, each tensor with a row an image."""
        raise NotImplementedError

    def prepare_texts(self, texts: Tokens) -> Rows:
        """Return what `score` needs of captions, each tensor with a row a caption."""
        raise NotImplementedError

    def score(self, images: Rows, texts: Rows) -> pairs.Maps:
        """Return maps over pairs, each (b_v, b_t): "similarity" and what the losses need."""
        raise NotImplementedError

    def pair_maps(self, images: Tokens, texts: Tokens) -> pairs.Maps:
        """Return every map that `score` makes over all pairs, each (B_v, B_t)."""
        return self.prepared_maps(self.prepare_images(images), self.bucketed(texts))

    def bucketed(self, texts: Tokens) -> Any:
        """Return captions prepared once for any number of `prepared_maps`, with a length."""
        return pairs.bucketed(self, texts)

    def prepared_maps(self, images: Rows, texts: Any) -> pairs.Maps:
        """Return `pair_maps` of prepared images and `bucketed` captions."""
        return pairs.all_pairs(self, images, texts)

    def pair_scores(self, images: Rows, texts: Tokens, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the similarity of the pairs (rows[p], columns[p]) alone, (P,)."""
        return pairs.chosen_pairs(self, images, self.prepare_texts(texts), rows, columns)

    def patch_choice(self, images: Tokens, texts: Tokens) -> PatchChoice | None:
        """Return which patches each pair keeps, and why; None where all take part."""
        return None

    def similarity(self, images: Tokens, texts: Tokens) -> Tensor:
        """Return the similarity matrix (B_v, B_t), higher is better."""
        return self.pair_maps(images, texts)["similarity"]

    gather = staticmethod(gather_rows)

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Same as `training_losses`; DistributedDataParallel calls it."""
        return self.training_losses(*args, **kwargs)

    def training_losses(
        self,
        pixels: Tensor,
        ids: Tensor,
        lengths: Tensor,
        image_ids: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
        pixel_lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return "loss", which is minimised, and its parts, for matching pairs.

        Row i of every argument belongs to pair i. Under DDP each rank passes its own pairs; the
        loss is that of the global batch, the same on every rank.
        """
        dense = (dense_ids, dense_lengths)  # each side takes it only where it owns it
        images = self.encode_images(pixels, *dense, pixel_lengths)
        texts = self.encode_texts(ids, lengths, *dense)
        texts, image_ids = gather_tokens(texts), gather_rows(image_ids)
        losses = self.losses(images, texts, image_ids)
        return pairs.with_global_loss(self, losses, images, texts, image_ids)

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        """Return the losses of this rank's images and all captions; `image_ids` (B_t,): whose."""
        maps = self.loss_maps(images, texts, image_ids)
        alignment = self.criterion(maps["similarity"], image_ids)
        return {"loss": alignment, "alignment": alignment.detach()}

    def loss_maps(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> pairs.Maps:
        """Return `pair_maps` of the global batch, each (B, B), with gradient where it is read."""
        return pairs.loss_maps(self, images, texts, image_ids)
