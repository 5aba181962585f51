"""What a method is: tokens of images, tokens of captions, a similarity, losses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.batch import Batch, Tokens, length_buckets
from lib.distributed import gather_rows, gather_sizes, gather_tokens, rank
from lib.errors import InputError
from lib.model import kernels
from lib.model.alignment import best_affinities, mean_of_best
from lib.model.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.model.losses import AlignmentLoss, ratio_loss
from lib.model.slimming import LapsNetwork, summarise_text

Prepared = dict[str, Tensor]
CAPTIONS_WITHOUT_GRAPH = 256  # of a chunk
PAIRS_WITHOUT_GRAPH = 256  # of a chunk on the CPU: what it makes stays near the caches
PAIRS_AT_ONCE = 256  # scored one by one, each with its own copy of the image's patches
MOST_READ = 4  # similarities a pair that are worth scoring twice


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model flags that several methods read; names follow the LAPS family."""
    group = parser.add_argument_group("model")
    group.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    group.add_argument(
        "--vit_type",
        default="vit",
        help="image encoder: vit|vit_224, vit_384, swin|swin_224, swin_384, tiny (from scratch), "
        "a Hugging Face id or a local folder",
    )
    group.add_argument(
        "--bert_path",
        default="bert-base-uncased",
        help="text encoder: a Hugging Face id, a local folder, or tiny (from scratch)",
    )
    group.add_argument("--img_res", type=int, default=224, help="image side in pixels")
    group.add_argument(
        "--precomp",
        type=int,
        default=0,
        help="1: images are precomputed region features, not pixels; --vit_type is not used",
    )
    group.add_argument(
        "--region_dim", type=int, default=2048, help="channels of a precomputed region"
    )
    group.add_argument(
        "--max_word", type=int, default=90, help="longest caption in word pieces; the rest is cut"
    )
    group.add_argument(
        "--max_dense_word", type=int, default=0, help="the same for dense texts; 0: as --max_word"
    )
    group.add_argument("--tiny_width", type=int, default=64, help="width of the tiny encoders")
    group.add_argument("--tiny_layers", type=int, default=2, help="layers of the tiny encoders")
    group.add_argument("--tiny_patch_size", type=int, default=16, help="patch of the tiny ViT")
    group.add_argument(
        "--shard_size",
        type=int,
        default=64,
        help="the similarity works on at most shard_size x shard_size pairs at once; more of them "
        "are computed again in the backward pass",
    )
    group.add_argument("--gradient_checkpointing", type=int, default=0, help="backbones recompute")

    slimming = parser.add_argument_group("patch slimming (seps, laps and their kin)")
    slimming.add_argument("--sparse_ratio", type=float, default=0.5, help="share of patches kept")
    slimming.add_argument(
        "--aggr_ratio", type=float, default=0.4, help="aggregated patches per kept patch"
    )
    slimming.add_argument(
        "--attention_weight", type=float, default=0.8, help="attention's share of a patch's score"
    )
    slimming.add_argument("--ratio_weight", type=float, default=2.0, help="weight of ratio loss")
    slimming.add_argument(
        "--detach_patches",
        type=int,
        default=None,
        help="1: patches are taken without gradient, as the released SEPS code does (its preset's "
        "default); 0: with gradient (the default elsewhere)",
    )

    dense = parser.add_argument_group("dense text (seps, dense_text)")
    dense.add_argument(
        "--dense_match",
        default="none",
        choices=["max_mean", "mean", "none"],
        help="match captions with the images' dense texts and add that to the similarity: best "
        "words both ways; cosine of mean embeddings; not at all. dense_text, which is this match "
        "alone, takes none for max_mean",
    )

    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss",
        default="vse",
        choices=["vse", "trip", "infonce"],
        help="vse: hinge triplet; trip: distance-weighted sampling; infonce: symmetric InfoNCE",
    )
    loss.add_argument("--margin", type=float, default=0.2, help="margin of the triplet losses")


def check_slimming(args: argparse.Namespace) -> None:
    """Raise InputError where a flag of the slimming group is out of range."""
    low_ends = {"sparse_ratio": True, "aggr_ratio": True, "attention_weight": False}
    for flag, low_open in low_ends.items():
        value = getattr(args, flag)
        if not (0 < value <= 1 if low_open else 0 <= value <= 1):
            interval = "(0, 1]" if low_open else "[0, 1]"
            raise InputError(f"--{flag} {value}: give a number in {interval}")


class Method(nn.Module):
    """Base of all methods; a subclass is one file and one `@register_method`.

    A subclass writes `score` for one chunk of pairs; `similarity` cuts all pairs into chunks of at
    most `shard_size` x `shard_size`, recomputing each in the backward pass so that memory is that
    of one chunk. What depends on the image or caption alone goes into `prepare_images` and
    `prepare_texts`, done once. `scores_repeat` is False where scoring a pair again would give
    another number, or is so cheap that `loss_maps` need not choose pairs.
    """

    name: ClassVar[str]
    uses_pixels: ClassVar[bool] = True
    dense_gradient: bool = True  # False where the dense text only chooses: its graph is spared
    scores_repeat: bool = True
    accepts_regions: ClassVar[bool] = False  # takes precomputed regions in the place of pixels

    def __init__(
        self,
        image_encoder: ImageEncoder | nn.Module | None,
        text_encoder: TextEncoder | nn.Module,
        criterion: AlignmentLoss,
        shard_size: int = 64,
        dense_owner: str | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.criterion = criterion
        self.shard_size = shard_size
        self.dense_owner = dense_owner

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        """Add the flags that this method alone reads."""

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> Method:
        """Return the method that `args` describes; the only place that sees the Namespace."""
        raise NotImplementedError

    @classmethod
    def wants_dense(cls, args: argparse.Namespace) -> str | None:
        """Return who is given the dense text under `args`: "image", "caption" or None."""
        return None

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        """Raise InputError where flags contradict each other; called before anything is loaded."""

    @property
    def protocol(self) -> str:
        """Return the evaluation protocol of SPEC 8: image, none or oracle."""
        return {"image": "image", "caption": "oracle", None: "none"}[self.dense_owner]

    @property
    def may_leave_unused(self) -> bool:
        """Return True where a training step can leave a parameter without gradient (for DDP)."""
        return False

    def set_hard_negatives(self, hard: bool) -> None:
        """Use the hardest negative of each row and column instead of the sum over all."""
        self.criterion.hard_negatives = hard

    def set_alignment_scale(self, scale: float) -> None:
        """Multiply the alignment loss, and nothing beside it, by `scale` (embedding warm-up)."""
        self.criterion.scale = scale

    # --- encoding ------------------------------------------------------------------------------

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
        tokens.dense = self._encode_dense("image", dense_ids, dense_lengths)
        return tokens

    def encode_texts(
        self,
        ids: Tensor,
        lengths: Tensor,
        dense_ids: Tensor | None = None,
        dense_lengths: Tensor | None = None,
    ) -> Tokens:
        """Return the captions' tokens: local (B_t, M, C), mask, and dense words where given."""
        tokens = self.text_encoder(ids, lengths)
        tokens.dense = self._encode_dense("caption", dense_ids, dense_lengths)
        return tokens

    def encode_image_batch(self, batch: Batch) -> Tokens:
        """Return `encode_images` of a batch; a dense text in it counts where images own theirs."""
        return self.encode_images(
            batch.pixels, batch.dense_ids, batch.dense_lengths, batch.pixel_lengths
        )

    def encode_text_batch(self, batch: Batch) -> Tokens:
        """Return `encode_texts` of a batch; a dense text in it counts where captions own it."""
        return self.encode_texts(batch.ids, batch.lengths, batch.dense_ids, batch.dense_lengths)

    def _encode_dense(self, owner: str, ids: Tensor | None, lengths: Tensor | None):
        """Return the dense text's tokens where `owner` is who this method gives it to."""
        if self.dense_owner != owner:
            return None
        if ids is None:
            raise ValueError(
                f"{self.name} reads a dense text of each {owner}: pass dense_ids and dense_lengths"
            )
        if self.dense_gradient:
            return self.text_encoder(ids, lengths)
        with _without_graph(ids.device):
            return self.text_encoder(ids, lengths)

    # --- similarity ----------------------------------------------------------------------------

    def prepare_images(self, images: Tokens) -> Prepared:
        """Return what `score` needs of images, each tensor with a row an image."""
        raise NotImplementedError

    def prepare_texts(self, texts: Tokens) -> Prepared:
        """Return what `score` needs of captions, each tensor with a row a caption."""
        raise NotImplementedError

    def score(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        """Return maps over pairs, each (b_v, b_t): "similarity" and what the losses need."""
        raise NotImplementedError

    def pair_maps(self, images: Tokens, texts: Tokens) -> dict[str, Tensor]:
        """Return every map that `score` makes over all pairs, each (B_v, B_t)."""
        return self.prepared_maps(self.prepare_images(images), texts)

    def prepared_maps(self, images: Prepared, texts: Tokens) -> dict[str, Tensor]:
        """Return `pair_maps` of prepared images.

        Chunks hold captions of about one length, so that no padding is multiplied, and at most
        `most_pairs` pairs; with more than that, the backward pass computes each chunk again.
        """
        most, graph = self.most_pairs, torch.is_grad_enabled()
        again = graph and len(next(iter(images.values()))) * len(texts) > most
        score = self._score_again if again else self.score
        captions = min(most, self.shard_size if graph else CAPTIONS_WITHOUT_GRAPH)
        if not graph and texts.local.device.type == "cpu":
            most = min(most, PAIRS_WITHOUT_GRAPH)
        columns, order = [], []
        for rows in length_buckets(texts.lengths.tolist(), captions):
            alike = texts[rows] if len(rows) < len(texts) else texts
            part = self.prepare_texts(alike.trimmed())
            chunks = _chunks(images, max(1, most // len(rows)))
            columns.append(_stacked([score(chunk, part) for chunk in chunks], 0))
            order += rows if alike is not texts else range(len(texts))
        maps = _stacked(columns, 1)
        if order == sorted(order):
            return maps
        places = torch.tensor(order, device=texts.local.device).argsort()
        return {key: value[:, places] for key, value in maps.items()}

    @property
    def is_fused(self) -> bool:
        """Return whether the kernel scores the pairs now: never with a graph or in training."""
        return False

    @property
    def most_pairs(self) -> int:
        """Return how many pairs `score` is given at once."""
        return kernels.PAIRS if self.is_fused else self.shard_size**2

    def pair_scores(self, images: Prepared, texts: Tokens, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the similarity of the pairs (rows[p], columns[p]) alone, (P,)."""
        prepared = self.prepare_texts(texts)

        def one_pair(image: Prepared, text: Prepared) -> Tensor:
            return self.score(_rows_of(image, None), _rows_of(text, None))["similarity"][0, 0]

        def scores(rows: Tensor, columns: Tensor) -> Tensor:
            return torch.vmap(one_pair)(_rows_of(images, rows), _rows_of(prepared, columns))

        parts = list(zip(rows.split(PAIRS_AT_ONCE), columns.split(PAIRS_AT_ONCE), strict=True))
        if len(parts) == 1:
            return scores(*parts[0])
        return torch.cat([checkpoint(scores, *part, use_reentrant=False) for part in parts])

    def kept_patches(self, images: Tokens, texts: Tokens) -> Tensor | None:
        """Return which patches each pair keeps, bool (B_v, B_t, L); None where all take part."""
        return None

    def similarity(self, images: Tokens, texts: Tokens) -> Tensor:
        """Return the similarity matrix (B_v, B_t), higher is better."""
        return self.pair_maps(images, texts)["similarity"]

    def _score_again(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        """Return `score`, keeping nothing for the backward pass, which computes it again."""
        return checkpoint(self.score, images, texts, use_reentrant=False)

    # --- training ------------------------------------------------------------------------------

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
        return self.losses(images, gather_tokens(texts), gather_rows(image_ids))

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        """Return the loss dictionary for this rank's `images` and all ranks' captions.

        `image_ids` (B_t,) says which image each caption, and so each global row, belongs to.
        """
        maps = self.loss_maps(images, texts, image_ids)
        alignment = self.criterion(maps["similarity"], image_ids)
        return {"loss": alignment, "alignment": alignment.detach()}

    def loss_maps(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        """Return `pair_maps` of the global batch, each (B, B), for this rank's `images`.

        Where the loss reads only the hardest negatives, all pairs are scored without a graph, and
        the similarities that take part in the loss once more with one: at most three a row, but for
        ties.
        """
        prepared = self.prepare_images(images)
        few = self.criterion.reads_few_pairs and self.scores_repeat and torch.is_grad_enabled()
        if few:
            with _without_graph(texts.local.device):
                maps = self._gathered_maps(prepared, texts)
            pairs = self.criterion.pairs_read(maps["similarity"], image_ids)  # (B, B)
            few = int(pairs.sum()) <= MOST_READ * len(pairs)  # the same on every rank
        if not few:
            return self._gathered_maps(prepared, texts)
        first = sum(gather_sizes(len(images), texts.local.device)[: rank()])
        rows, columns = pairs[first : first + len(images)].nonzero(as_tuple=True)
        scores = self.pair_scores(prepared, texts, rows, columns)
        # the values of the first pass, so that the loss picks the pairs that were picked here
        gradient = scores.new_zeros(len(images), len(texts))
        gradient = gradient.index_put((rows, columns), scores - scores.detach())
        maps["similarity"] = maps["similarity"] + self.gather(gradient)
        return maps

    def _gathered_maps(self, images: Prepared, texts: Tokens) -> dict[str, Tensor]:
        maps = self.prepared_maps(images, texts)
        return {key: self.gather(value) for key, value in maps.items()}


class LapsFamily(Method):
    """What LAPS, the released SEPS and improved LAPS share: one `LapsNetwork` and its ratio loss.

    `ratio_lambdas` weigh the kept share in the ratio loss, a constant under hard top-k.
    """

    ratio_lambdas: ClassVar[tuple[float, float]] = (1.0, 0.0)

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

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        check_slimming(args)

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
        return not self.training and kernels.serves(self.network.head.scale)

    def prepare_images(self, images: Tokens) -> Prepared:
        return self.network.prepare(self.patches_of(images), images.cls, fused=self.is_fused)

    def patches_of(self, images: Tokens) -> Tensor:
        """Return the patches (B_v, L, C), without gradient where the flag says so."""
        return images.local.detach() if self.detach_patches else images.local

    def prepare_texts(self, texts: Tokens) -> Prepared:
        return summarise_text(texts.local, texts.mask)

    def score(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        masks = texts["word_mask"].new_ones(1), texts["word_mask"]  # every token is real
        return {"similarity": mean_of_best(*self._best(images, texts, *masks), *masks)}

    def _best(
        self, images: Prepared, texts: Prepared, token_mask: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each word's best token and each token's best word, (B_v, T, M) and (B_v, T, N)."""
        if not self.is_fused:
            cosines = self.network.tokens(images, texts["global"]).products(texts["words"])
            return best_affinities(cosines, token_mask, word_mask)
        fixed = images["fixed"]
        return kernels.fused_matches(
            self.network.scores(images, texts["global"]),
            images["logits"],
            images["patches"],
            texts["words"],
            word_mask,
            fixed,
            fixed.new_ones(fixed.shape[:2], dtype=torch.bool),
            self.network.kept,
        )

    def kept_patches(self, images: Tokens, texts: Tokens) -> Tensor:
        embeddings = self.prepare_texts(texts)["global"]
        return self.network.select(self.prepare_images(images), embeddings)[1]

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        losses = super().losses(images, texts, image_ids)
        share = losses["loss"].new_tensor(self.network.kept_share)
        ratio = ratio_loss(share, None, self.network.sparse_ratio, *self.ratio_lambdas)
        return {**losses, "loss": losses["loss"] + self.ratio_weight * ratio, "ratio": ratio}


@contextmanager
def _without_graph(device: torch.device) -> Iterator[None]:
    """Switch gradient off; autocast must not keep weights for later that it casts meanwhile."""
    mixed = torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=mixed, cache_enabled=False):
        yield


def _rows_of(prepared: Prepared, rows: Tensor | slice | None) -> Prepared:
    return {key: value[rows] for key, value in prepared.items()}


def _stacked(parts: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {key: torch.cat([part[key] for part in parts], dim) for key in parts[0]}


def _chunks(prepared: Prepared, size: int) -> list[Prepared]:
    length = len(next(iter(prepared.values())))
    return [_rows_of(prepared, slice(first, first + size)) for first in range(0, length, size)]
