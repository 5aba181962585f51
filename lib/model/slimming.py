"""Patch scoring, selection and aggregation, shared by LAPS, SEPS and improved LAPS.

Everything that chooses patches runs in float32 (or float64), also under autocast: bf16 scores
change the kept set of most pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lib.batch import Rows
from lib.model import product
from lib.model.gram import SMALLEST_NORM, PairTokens, PatchSums, gram_matrix, unit, wide_gram
from lib.model.precision import full_precision, is_half
from lib.model.selection import Selection, top_k_mask

UNIFORM_MARGIN = 1e-6  # of Gumbel noise, from 0 and from 1
IMAGE_SCORES = ("mean", "distinct", "none")
LARGEST_EXPONENT = 30.0  # of a logit above the kept ones


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real tokens, at least float32: (B, N, C), (B, N) -> (B, C).

    A half-precision mean moves the scores that choose patches, and with them one kept set in ten.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    total = tokens.masked_fill(~mask[:, :, None], 0).sum(1, dtype=wide)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def kept_count(num_patches: int, sparse_ratio: float) -> int:
    """Return K = ceil(L·ρ), at least 1 and at most L."""
    return max(1, min(num_patches, math.ceil(num_patches * sparse_ratio)))


def aggregated_count(num_patches: int, sparse_ratio: float, aggr_ratio: float) -> int:
    """Return N_c = int(L·α_r·ρ), at least 1."""
    return max(1, int(num_patches * aggr_ratio * sparse_ratio))


@full_precision
def global_scores(patches: Tensor, embeddings: Tensor) -> Tensor:
    """Return patch-text cosines: (B_v, L, C), global (B_t, C) -> (B_v, B_t, L)."""
    norms = torch.linalg.vector_norm(patches, dim=-1).clamp(min=SMALLEST_NORM)  # (B_v, L)
    products = patches.flatten(0, 1) @ normalize(embeddings, dim=-1).T  # one product, (B_v·L, B_t)
    products = products.unflatten(0, norms.shape).transpose(1, 2)
    return (products / norms[:, None]).contiguous()


@torch.no_grad()
def text_scores(patches: Tensor, embeddings: Tensor, gram: Tensor | None = None) -> Tensor:
    """Return `global_scores`, no gradient; given gram (B_v, L, L), V Vᵀ, by compiled products.

    Embeddings (T, C), or (B_v, T, C) each image's own.
    """
    if gram is None or not product.serves(patches, embeddings):
        if embeddings.dim() == 2:
            return global_scores(patches, embeddings)
        return torch.stack([own_scores(patches, one) for one in embeddings.unbind(1)], 1)
    # the diagonal of V Vᵀ holds the squared norms
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().clamp(min=SMALLEST_NORM)  # (B_v, L)
    unit_embeddings = normalize(embeddings, dim=-1).expand(len(patches), -1, -1)
    return product.multiply(unit_embeddings, patches.transpose(1, 2)).div_(norms[:, None])


@full_precision
def own_scores(patches: Tensor, embeddings: Tensor) -> Tensor:
    """Return cosines of patches with one embedding an image: (B, L, C), (B, C) -> (B, L)."""
    return (normalize(patches, dim=-1) @ normalize(embeddings, dim=-1)[:, :, None]).squeeze(-1)


@torch.no_grad()
def image_score(patches: Tensor, mask: Tensor, kind: str = "mean") -> Tensor:
    """Return s^im of SEPS eq. 2 in [0, 1], no gradient: (B, L, C), (B, L) -> (B, L).

    `mean`: likeness to the image's mean patch. NOTE: that favours what a picture is full of, its
    background where things are small; `distinct`, 1 − that, and `none`, 0, are ours.
    """
    if kind == "none":
        return patches.new_zeros(
            patches.shape[:2], dtype=torch.promote_types(patches.dtype, torch.float32)
        )
    likeness = min_max(own_scores(patches, masked_mean(patches, mask)))
    return 1 - likeness if kind == "distinct" else likeness


@full_precision
def min_max(scores: Tensor) -> Tensor:
    """Return the scores stretched to [0, 1] over the last dimension; constant rows become 0."""
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).eps)


@full_precision
def gumbel_decision(significance: Tensor, k: int, tau: float) -> Tensor:
    """Return straight-through keep decisions of a two-class Gumbel-softmax, (…, L) in {0, 1}.

    A patch is kept with probability σ((significance − centre) / tau), on its own; the centre lies
    between the k-th and the next significance of its row, so that top-k is the limit of tau → 0 and
    k patches are kept about. How many is free, and the ratio loss steers it. Where chance keeps no
    patch of a row, the most significant one stays. The gradient is the soft decision's.
    """
    if k >= significance.shape[-1]:
        return torch.ones_like(significance)
    logit = (significance - _centre(significance, k)) / tau
    # the difference of two Gumbel variables is logistic
    uniform = torch.rand_like(logit).clamp(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN)
    soft = (logit + uniform.logit()).sigmoid()
    hard = soft > 0.5
    hard = hard | (~hard.any(-1, keepdim=True) & top_k_mask(significance.detach(), 1))
    return hard.to(soft.dtype) + (soft - soft.detach())  # forward exactly 0 or 1


def _centre(significance: Tensor, k: int) -> Tensor:
    """Return the middle between the k-th and the next value of each row, (…, 1); k below L."""
    return significance.topk(k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)


def selected_softmax(logits: Tensor, decision: Tensor) -> Tensor:
    """Return the softmax over the kept entries of the last dimension; a row that keeps none is 0.

    `decision` broadcasts against `logits`: bool, or float in {0, 1} that then also multiplies
    inside the softmax, so that gradient reaches it.
    """
    if decision.dtype == torch.bool:
        weights = logits.masked_fill(~decision, -math.inf).softmax(-1)
        return weights.masked_fill(~decision, 0)
    kept = decision.detach() > 0
    top = logits.detach().masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    mass = decision * (logits - top).clamp(max=LARGEST_EXPONENT).exp()
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def drops_any(decision: Tensor) -> Tensor:
    """Return whether a decision (…, L) drops any patch, (…)."""
    return (decision.detach() < 0.5).any(-1) if decision.is_floating_point() else ~decision.all(-1)


def invert(decision: Tensor) -> Tensor:
    """Return the decision that keeps what this one drops."""
    return ~decision if decision.dtype == torch.bool else 1 - decision


def peak_weights(logits: Tensor) -> Tensor | None:
    """Return exp(logits − their maximum), (B_v, N_c, L): masked and divided by its sum, a softmax.

    Computed once an image, where a softmax over the kept patches is a matter of each pair. None
    where logits of one token lie further apart than `LARGEST_EXPONENT`: there the kept patches of a
    pair might all vanish beside one that is dropped, and `selected_softmax` must serve.
    """
    low, high = logits.detach().aminmax(dim=-1, keepdim=True)
    if not bool((high - low).amax() < LARGEST_EXPONENT):
        return None
    return (logits - high).exp().contiguous()  # logits come transposed; pairs multiply these


@full_precision
def selected_sums(made: Aggregation, decision: Tensor) -> PatchSums:
    """Return N_c sums of each image's kept patches for each caption, weighted by a softmax.

    decision (B_v, T, L), bool or float in {0, 1}.
    """
    peaks = made.peaks
    if peaks is None:
        return PatchSums(selected_softmax(made.logits[:, None], decision[:, :, None]))
    kept = decision.to(peaks.dtype)
    mass = kept @ peaks.transpose(1, 2)  # (B_v, T, N_c)
    return PatchSums(
        peaks[:, None] * kept[:, :, None], mass.clamp(min=torch.finfo(mass.dtype).tiny)
    )


def dropped_sum(scores: Tensor, decision: Tensor) -> PatchSums:
    """Return the fused token, Σ over dropped patches of softmax(score)·patch: (B_v, T, L) both."""
    return PatchSums(selected_softmax(scores, invert(decision))[:, :, None])


@dataclass
class Branch:
    """What one text chose: sums of kept and of dropped patches, the kept share, if any dropped."""

    local: PatchSums  # N_c tokens
    dropped: PatchSums  # the fused token
    kept: Tensor  # (B_v, T) in [0, 1]
    drops: Tensor  # (B_v, T) bool


class AggregationHead(nn.Module):
    """Aggregation logits of a patch, once an image: (B_v, L, C) -> (B_v, N_c, L).

    LayerNorm, Linear C → int(0.2·C), GELU, Linear → N_c, times a learnt scalar (LAPS).
    """

    def __init__(self, width: int, tokens: int, hidden_ratio: float = 0.2) -> None:
        super().__init__()
        hidden = max(1, int(width * hidden_ratio))
        self.weight = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, tokens)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, patches: Tensor) -> Tensor:
        return (product.apply_layers(self.weight, patches) * self.scale).transpose(1, 2)


@dataclass
class Aggregation(Rows):
    """What `selected_sums` and `PairTokens` need of images, a row each."""

    recomputed = ("peaks", "gram")

    logits: Tensor  # (B_v, N_c, L)
    peaks: Tensor | None = None  # `peak_weights` of them, where they serve
    gram: Tensor | None = None  # `gram_matrix` of the patches, where it pays


def aggregation(head: AggregationHead, patches: Tensor, fused: bool) -> Aggregation:
    """Return the aggregation of patches (B_v, L, C); a kernel (`fused`) reads no peaks.

    The one on CUDA makes the Gram matrix itself; that of the CPU is called more often, and sees to
    the gradient through it.
    """
    logits = head(patches)
    if fused:
        return Aggregation(logits, gram=_fused_gram(patches))
    return Aggregation(logits, peak_weights(logits), gram_matrix(patches, logits.shape[1]))


def without_kernel(images: Any) -> Any:
    """Return prepared images with what PyTorch reads of them where it takes a kernel's place."""
    logits = images.aggregation.logits
    gram = gram_matrix(images.patches, logits.shape[1])
    return replace(images, aggregation=Aggregation(logits, peak_weights(logits), gram))


def _fused_gram(patches: Tensor) -> Tensor | None:
    if not patches.is_cpu:
        return None
    if product.serves(patches):
        return product.multiply(patches, patches.transpose(1, 2))
    return wide_gram(patches)


class PatchScore(nn.Module):
    """Predicted significance s^p = sigmoid(MLP(v)), SEPS eq. 1: (B_v, L, C) -> (B_v, L)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, patches: Tensor) -> Tensor:
        with torch.autocast(patches.device.type, enabled=False):
            wide = patches.float() if is_half(patches) else patches
            return product.apply_layers(self.mlp, wide).squeeze(-1).sigmoid()


class WordSelection(nn.Module):
    """Which words enter the similarity: normalised words (B_t, M, C), mask -> bool (B_t, M).

    A word's score is its product with a projection of the caption's [CLS]. `ratio` keeps the
    ceil((n − 1)·ratio) best, `score` those above 0; [CLS] stays always. The choice carries no
    gradient, so that this layer is never trained. Source: improved LAPS, SPEC 10.
    """

    def __init__(self, width: int, strategy: str = "ratio", ratio: float = 1.0) -> None:
        super().__init__()
        if strategy not in ("ratio", "score"):
            raise ValueError(f"unknown word selection {strategy!r}; known: ratio, score")
        self.strategy = strategy
        self.ratio = ratio
        self.attn_mat = nn.Linear(width, width)

    @torch.no_grad()
    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(words.device.type, enabled=False):
            wide = words.float() if is_half(words) else words
            scores = (wide @ self.attn_mat(wide[:, :1]).transpose(1, 2)).squeeze(-1)  # (B_t, M)
        candidates = mask.clone()
        candidates[:, 0] = False
        if self.strategy == "score":
            kept = candidates & (scores > 0)
        else:
            count = (candidates.sum(1).double() * self.ratio).ceil()  # float32 can round past it
            order = scores.masked_fill(~candidates, -math.inf).argsort(1, descending=True)
            kept = candidates & (order.argsort(1) < count[:, None])
        kept[:, 0] = True
        return kept


@dataclass
class TextSummary(Rows):
    """What LAPS needs of each text."""

    words: Tensor  # (B_t, M, C) normalised
    word_mask: Tensor  # (B_t, M)
    embedding: Tensor  # (B_t, C) the text's global one, without gradient: it only chooses patches


def summarise_text(words: Tensor, mask: Tensor) -> TextSummary:
    """Return the summary of words (B_t, M, C) and mask (B_t, M); the global one is their mean."""
    return TextSummary(normalize(words, dim=-1), mask, masked_mean(words, mask).detach())


@dataclass
class SlimmedImages(Rows):
    """What LAPS needs of each image, whatever the text."""

    patches: Tensor  # (B_v, L, C)
    own: Tensor  # (B_v, L) cosine of each patch with the image's global embedding
    fixed: Tensor  # (B_v, F, C) normalised tokens that no text changes
    aggregation: Aggregation


class LapsNetwork(nn.Module):
    """Patch slimming of LAPS (CVPR 2024): the tokens that stand for an image before a text, SPEC 3.

    Shared by `laps`, `seps_released` and `ilaps`. Nothing that depends on the image alone is done
    for each pair; only the choice of patches is.

    NOTE: with ρ = 1 nothing is dropped, and the fused token is a zero that still counts in the
    means over tokens, as in the official code.
    """

    def __init__(
        self, width: int, num_patches: int, sparse_ratio: float, aggr_ratio: float
    ) -> None:
        super().__init__()
        self.sparse_ratio = sparse_ratio
        self.num_patches = num_patches
        self.kept = kept_count(num_patches, sparse_ratio)
        self.selection = Selection()
        self.head = AggregationHead(width, aggregated_count(num_patches, sparse_ratio, aggr_ratio))

    def prepare(
        self,
        patches: Tensor,
        cls: Tensor | None,
        embeddings: Tensor | None = None,
        fused: bool = False,
    ) -> SlimmedImages:
        """Return what depends on the image alone, for `tokens`, or for the kernel where `fused`.

        patches (B_v, L, C), cls (B_v, 1, C) or None; `embeddings` (B_v, C) are the images' global
        ones, by default the mean of the patches.
        """
        made = aggregation(self.head, patches, fused)
        with torch.no_grad():
            if embeddings is None:
                wide = torch.promote_types(patches.dtype, torch.float32)
                embeddings = patches.mean(1, dtype=wide)
            gram = made.gram if fused else None
            own = text_scores(patches, embeddings[:, None], gram)[:, 0]
        fixed = unit(patches[:, :0] if cls is None else cls)  # what no text changes
        return SlimmedImages(patches, own, fixed, made)

    @torch.no_grad()
    def scores(self, images: SlimmedImages, embeddings: Tensor, fused: bool = False) -> Tensor:
        """Return each pair's patch scores, (B_v, T, L), no gradient.

        `embeddings` (T, C) are the texts' global ones.
        """
        gram = images.aggregation.gram if fused else None
        return text_scores(images.patches, embeddings, gram).add_(images.own[:, None])

    def select(self, images: SlimmedImages, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return `scores` and which patches stay, bool (B_v, T, L)."""
        scores = self.scores(images, embeddings)
        return scores, self.selection(scores, self.kept, images.own)

    def tokens(self, images: SlimmedImages, embeddings: Tensor) -> PairTokens:
        """Return [aggregated; fused; v_cls] of every pair."""
        scores, decision = self.select(images, embeddings)
        made = images.aggregation
        local = selected_sums(made, decision)
        sums = [local, dropped_sum(scores, decision)]
        return PairTokens(images.patches, sums, images.fixed, made.gram)

    @property
    def kept_share(self) -> float:
        """Return the share of patches that every pair keeps, in (0, 1]."""
        return self.kept / self.num_patches
