"""SEPS: patches chosen under a sparse and a dense text, relevance-aware patch-word similarity."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.alignment import DenseMatch, Relevance, pair_affinity, relevance_aware
from lib.batch import Tokens
from lib.encoders import EncoderSource, ImageEncoder, TextEncoder
from lib.errors import InputError
from lib.losses import AlignmentLoss, ratio_loss
from lib.methods.base import Method, Prepared, check_slimming
from lib.methods.registry import register_method
from lib.slimming import (
    AggregationHead,
    PatchScore,
    aggregate,
    aggregated_count,
    fuse_dropped,
    global_scores,
    gumbel_decision,
    kept_count,
    masked_mean,
    min_max,
    own_scores,
    top_k_mask,
)

DENSE_WEIGHT = 0.1  # where the learnt weight of --dense_match starts


@register_method("seps")
class SEPS(Method):
    """Semantic-Enhanced Patch Slimming, SPEC 4 (arXiv 2511.01390, eq. 1-7).

    With the dense text on the image side, the dense branch is computed once an image. With
    `dense_match` the image's dense text is also matched with the caption, SPEC 4.2.

    NOTE: the paper's MLP of eq. 5 is `relevance="topk_mlp"`; the default is the mean of the top k.
    NOTE: the released code has neither s^p nor eq. 5; `seps_released` is that code.
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
        attention_weight: float = 0.8,
        ratio_weight: float = 2.0,
        ratio_lambdas: tuple[float, float] = (0.5, 0.5),
        selection: str = "topk",
        gumbel_tau: float = 1.0,
        relevance: str = "topk_mean",
        relevance_topk: int = 5,
        dense_side: str = "image",
        dense_match: str = "none",
        detach_patches: bool = False,
    ) -> None:
        owner = _dense_owner(dense_side, dense_match)
        super().__init__(image_encoder, text_encoder, criterion, shard_size, owner)
        num_patches = image_encoder.num_patches
        tokens = aggregated_count(num_patches, sparse_ratio, aggr_ratio)
        self.sparse_ratio = sparse_ratio
        self.kept = kept_count(num_patches, sparse_ratio)
        self.beta = attention_weight / 2
        self.ratio_weight = ratio_weight
        self.ratio_lambdas = ratio_lambdas
        self.selection = selection
        self.gumbel_tau = gumbel_tau
        self.detach_patches = detach_patches
        self.patch_score = PatchScore(embed_size)
        self.sparse_head = AggregationHead(embed_size, tokens)
        self.guide = None if dense_side == "none" else dense_side  # whose dense text guides
        self.dense_head = None if self.guide is None else AggregationHead(embed_size, tokens)
        self.dense_gradient = dense_match != "none"
        self.dense_match = None
        if dense_match != "none":
            self.dense_match = DenseMatch(dense_match, initial_weight=DENSE_WEIGHT)
        self.word_relevance = Relevance(relevance, relevance_topk)
        self.token_relevance = Relevance(relevance, relevance_topk)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--selection", default="topk", choices=["topk", "gumbel"])
        group.add_argument("--gumbel_tau", type=float, default=1.0, help="Gumbel temperature")
        group.add_argument(
            "--relevance", default="topk_mean", choices=["topk_mean", "topk_mlp", "mean"]
        )
        group.add_argument("--relevance_topk", type=int, default=5, help="k of --relevance")
        group.add_argument(
            "--dense_side",
            default="image",
            choices=["image", "caption", "none"],
            help="whose dense text guides: the image's own; that of the caption's image (the "
            "oracle protocol); none",
        )
        group.add_argument("--ratio_lambda_sparse", type=float, default=0.5)
        group.add_argument("--ratio_lambda_dense", type=float, default=0.5)

    @classmethod
    def wants_dense(cls, args: argparse.Namespace) -> str | None:
        return _dense_owner(args.dense_side, args.dense_match)

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        check_slimming(args)
        _dense_owner(args.dense_side, args.dense_match)

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> SEPS:
        return cls(
            source.image(),
            source.text(),
            AlignmentLoss.from_args(args),
            embed_size=args.embed_size,
            shard_size=args.shard_size,
            sparse_ratio=args.sparse_ratio,
            aggr_ratio=args.aggr_ratio,
            attention_weight=args.attention_weight,
            ratio_weight=args.ratio_weight,
            ratio_lambdas=(args.ratio_lambda_sparse, args.ratio_lambda_dense),
            selection=args.selection,
            gumbel_tau=args.gumbel_tau,
            relevance=args.relevance,
            relevance_topk=args.relevance_topk,
            dense_side=args.dense_side,
            dense_match=args.dense_match,
            detach_patches=bool(args.detach_patches),
        )

    @property
    def may_leave_unused(self) -> bool:
        return self.detach_patches or self.kept == self.image_encoder.num_patches

    # --- once an image, once a caption ---------------------------------------------------------

    def prepare_images(self, images: Tokens) -> Prepared:
        patches = images.local.detach() if self.detach_patches else images.local  # (B_v, L, C)
        with torch.no_grad():
            s_im = min_max(own_scores(patches, masked_mean(patches, images.mask)))
        # the part of eq. 3 that no text changes, for both branches
        base = (1 - 2 * self.beta) * self.patch_score(patches) + self.beta * s_im  # (B_v, L)
        prepared = {
            "patches": patches,
            "base": base,
            "sparse_logits": self.sparse_head(patches),  # (B_v, N_c, L)
        }
        if images.cls is not None:
            prepared["cls"] = images.cls
        if self.guide == "caption":
            prepared["dense_logits"] = self.dense_head(patches)
        if self.guide == "image":
            prepared.update(self._image_dense(patches, base, images.dense))
        if self.dense_match is not None:
            prepared.update(self.dense_match.prepare(images.dense))
        return prepared

    def _image_dense(self, patches: Tensor, base: Tensor, dense: Tokens) -> Prepared:
        """Return the dense branch of images that own their dense text."""
        with torch.no_grad():
            s_dt = min_max(own_scores(patches, masked_mean(dense.local, dense.mask)))
        significance = (base + self.beta * s_dt)[:, None]  # (B_v, 1, L)
        decision = self._decide(significance)
        return {
            "dense_tokens": aggregate(patches, self.dense_head(patches), decision)[:, 0],
            "dense_fused": fuse_dropped(patches, significance, decision),  # (B_v, 1, C)
            "dense_kept": decision.to(base.dtype).mean(-1),  # (B_v, 1)
            "dense_drops": _drops_any(decision),  # (B_v, 1)
        }

    def prepare_texts(self, texts: Tokens) -> Prepared:
        prepared = {
            "words": normalize(texts.local, dim=-1),
            "word_mask": texts.mask,
            "global": masked_mean(texts.local, texts.mask).detach(),
        }
        if self.guide == "caption":
            prepared["dense_global"] = masked_mean(texts.dense.local, texts.dense.mask).detach()
        if self.dense_match is not None:
            prepared.update(self.dense_match.prepare(texts))
        return prepared

    # --- every pair ----------------------------------------------------------------------------

    def score(self, images: Prepared, texts: Prepared) -> dict[str, Tensor]:
        patches = images["patches"]
        shape = (len(patches), len(texts["words"]))
        sparse = self._branch(images, texts["global"], images["sparse_logits"])
        maps = {"kept_sparse": sparse["kept"]}
        if self.guide == "image":
            dense = {
                "tokens": images["dense_tokens"][:, None],
                "fused": images["dense_fused"][:, None],
                "drops": images["dense_drops"].expand(shape),
            }
            maps["kept_dense"] = images["dense_kept"].expand(shape)
        elif self.guide == "caption":
            dense = self._branch(images, texts["dense_global"], images["dense_logits"])
            maps["kept_dense"] = dense["kept"]
        else:
            dense = None
        affinity, mask = self._affinity(images, texts["words"], sparse, dense)
        maps["similarity"] = relevance_aware(
            affinity, mask, texts["word_mask"], self.word_relevance, self.token_relevance
        )
        if self.dense_match is not None:
            maps["similarity"] = maps["similarity"] + self.dense_match(images, texts)
        return maps

    def _branch(self, images: Prepared, embeddings: Tensor, logits: Tensor) -> Prepared:
        """Return one branch for every pair: aggregated tokens, fused token, kept share."""
        with torch.no_grad():
            attention = min_max(global_scores(images["patches"], embeddings))  # (B_v, T, L)
        significance = images["base"][:, None] + self.beta * attention
        decision = self._decide(significance)
        return {
            "tokens": aggregate(images["patches"], logits, decision),  # (B_v, T, N_c, C)
            "fused": fuse_dropped(images["patches"], significance, decision)[:, :, None],
            "kept": decision.to(significance.dtype).mean(-1),  # (B_v, T)
            "drops": _drops_any(decision),  # (B_v, T)
        }

    def _affinity(
        self, images: Prepared, words: Tensor, sparse: Prepared, dense: Prepared | None
    ) -> tuple[Tensor, Tensor]:
        """Return A of [v_cls; aggregated; fused] with the words, (B_v, T, N, M), and N's mask."""
        local = sparse["tokens"] if dense is None else sparse["tokens"] + dense["tokens"]
        parts, masks = [local], [sparse["drops"].new_ones(local.shape[:3])]
        if "cls" in images:
            parts.append(images["cls"][:, None])  # no caption changes it
            masks.append(masks[0][:, :, :1])
        for branch in (sparse, dense):
            if branch is not None:
                parts.append(branch["fused"])
                masks.append(branch["drops"][..., None])
        # one product a part: joining the small affinities is cheaper than joining the tokens
        affinity = torch.cat([pair_affinity(part, words) for part in parts], 2)
        return affinity, torch.cat(masks, 2)

    def _decide(self, significance: Tensor) -> Tensor:
        """Return which patches stay: bool (…, L), or straight-through float in Gumbel training."""
        if self.selection == "gumbel" and self.training:
            return gumbel_decision(significance, self.gumbel_tau)
        return top_k_mask(significance.detach(), self.kept)

    def kept_patches(self, images: Tokens, texts: Tokens) -> Tensor:
        """Return which patches each pair's sparse branch keeps, bool (B_v, B_t, L)."""
        prepared = self.prepare_images(images)
        embeddings = self.prepare_texts(texts)["global"]
        attention = min_max(global_scores(prepared["patches"], embeddings))
        return top_k_mask(prepared["base"][:, None] + self.beta * attention, self.kept)

    # --- training ------------------------------------------------------------------------------

    def losses(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> dict[str, Tensor]:
        maps = {key: self.gather(value) for key, value in self.pair_maps(images, texts).items()}
        alignment = self.criterion(maps["similarity"], image_ids)
        ratio = ratio_loss(
            maps["kept_sparse"], maps.get("kept_dense"), self.sparse_ratio, *self.ratio_lambdas
        )
        losses = {
            "loss": alignment + self.ratio_weight * ratio,
            "alignment": alignment.detach(),
            "ratio": ratio.detach(),
            "kept_sparse": maps["kept_sparse"].detach().mean(),
        }
        if "kept_dense" in maps:
            losses["kept_dense"] = maps["kept_dense"].detach().mean()
        return losses


def _dense_owner(dense_side: str, dense_match: str) -> str | None:
    """Return who is given the dense text. Raises InputError where that would mix protocols."""
    if dense_match == "none":
        return None if dense_side == "none" else dense_side
    if dense_side == "caption":
        raise InputError(
            f"--dense_match {dense_match} matches the dense texts of gallery images, and "
            "--dense_side caption reads that of the caption's own image: give --dense_side image "
            "or none"
        )
    return "image"


def _drops_any(decision: Tensor) -> Tensor:
    return (decision.detach() < 0.5).any(-1) if decision.is_floating_point() else ~decision.all(-1)
