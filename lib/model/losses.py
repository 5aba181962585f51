"""Similarity matrix + image ids -> scalar loss: hinge, distance-weighted, InfoNCE, ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lib.model.precision import full_precision

SPHERE_DIMENSION = 512  # n of the distance-weighted sampling's q(d), fixed in SPEC 10
LARGEST_LOGIT_SCALE = 100.0


def negatives_mask(image_ids: Tensor) -> Tensor:
    """Return the (B, B) mask of wrong pairs: True where image and caption differ in image id."""
    return image_ids[:, None] != image_ids[None, :]


def hinge_triplet(
    similarity: Tensor, negatives: Tensor, margin: float, hardest: bool = False
) -> Tensor:
    """Return the bidirectional hinge triplet loss, summed over the batch.

    similarity (B, B) with the matching pairs on the diagonal, negatives (B, B) bool. `hardest`
    takes only the hardest negative of each row and of each column (VSE++), otherwise the sum over
    all negatives. Source: SPEC 6.
    """
    positive = similarity.diagonal()
    per_image = (margin + similarity - positive[:, None]).clamp(min=0)  # wrong captions of image i
    per_caption = (margin + similarity - positive[None, :]).clamp(min=0)  # wrong images of caption
    per_image = per_image.masked_fill(~negatives, 0)
    per_caption = per_caption.masked_fill(~negatives, 0)
    if hardest:
        return per_image.amax(1).sum() + per_caption.amax(0).sum()
    return per_image.sum() + per_caption.sum()


def hardest_pairs(similarity: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """Return the pairs that the gradient of `hinge_triplet(hardest=True)` reaches, bool (B, B).

    The diagonal, and each row's and column's hardest negatives (all of equal ones) where they
    violate the margin. Arguments as in `hinge_triplet`.
    """
    read = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    positive = similarity.diagonal()
    for dim, own in ((1, positive[:, None]), (0, positive[None, :])):
        hinge = (margin + similarity - own).masked_fill(~negatives, -math.inf)
        read |= (hinge == hinge.amax(dim, keepdim=True)) & (hinge >= 0)
    return read


def distance_weights(similarity: Tensor, negatives: Tensor, cutoff: float) -> Tensor:
    """Return each row's sampling weights over its negatives, (B, B) >= 0, rows sum to 1 or to 0.

    Inverse to the density q(d) of distances between random points on the unit sphere, so that easy
    and hard negatives are drawn alike; a row without a negative nearer than `cutoff` sums to 0.
    Source: SPEC 10 (HREM), after Wu et al., "Sampling matters", ICCV 2017.
    """
    distance = (2 - 2 * similarity.detach().float()).clamp(min=0).sqrt().clamp(min=0.5)
    n = SPHERE_DIMENSION
    log_density = (n - 2) * distance.log() + (n - 3) / 2 * (1 - distance.square() / 4).clamp(
        min=1e-8
    ).log()
    allowed = negatives & (distance < cutoff)
    logits = (-log_density).masked_fill(~allowed, -math.inf)
    return logits.softmax(1).nan_to_num(0.0)


def distance_weighted_triplet(
    similarity: Tensor,
    negatives: Tensor,
    margin: float,
    cutoff: float,
    generator: torch.Generator | None = None,
    cosines: Tensor | None = None,
) -> Tensor:
    """Return the hinge loss with one sampled negative a positive pair and direction, summed.

    `cosines` (B, B) say how near pairs are, by default the similarity itself.
    """
    positive = similarity.diagonal()
    loss = similarity.new_zeros(())
    near = similarity if cosines is None else cosines
    for scores, wrong, likeness in (
        (similarity, negatives, near),
        (similarity.T, negatives.T, near.T),
    ):
        weights = distance_weights(likeness, wrong, cutoff).cpu()
        found = (weights.sum(1) > 0).to(scores.device)
        safe = weights + (weights.sum(1, keepdim=True) == 0)
        drawn = torch.multinomial(safe, 1, generator=generator).to(scores.device)
        hinge = (margin + scores.gather(1, drawn).squeeze(1) - positive).clamp(min=0)
        loss = loss + hinge.masked_fill(~found, 0).sum()
    return loss


def info_nce(similarity: Tensor, negatives: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss, summed over the batch; `scale` is 1 / temperature.

    Other captions of the same image are left out of the denominators.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    logits = (similarity * scale).masked_fill(~(negatives | own), -math.inf)
    positive = logits.diagonal()
    return ((logits.logsumexp(1) - positive) + (logits.logsumexp(0) - positive)).sum() / 2


def ratio_loss(
    kept_sparse: Tensor,
    kept_dense: Tensor | None,
    sparse_ratio: float,
    lambda_sparse: float,
    lambda_dense: float,
) -> Tensor:
    """Return (ρ − λ1·mean(D_s) − λ2·mean(D_d))², eq. 7 of SEPS.

    `kept_*` are kept shares in [0, 1] of any shape. Without a dense branch its λ goes to the sparse
    one, so that the target stays in reach.
    """
    if kept_dense is None:
        kept_dense = kept_sparse
    target = lambda_sparse * kept_sparse.mean() + lambda_dense * kept_dense.mean()
    return (sparse_ratio - target) ** 2


class AlignmentLoss(nn.Module):
    """The loss that `--loss` names, on a global similarity matrix.

    similarity (B, B), image_ids (B,) -> scalar. `hard_negatives` switches the hinge loss from the
    sum over negatives to the hardest one; `scale` multiplies whatever comes out. Draws of `trip`
    follow `seed` and a stored counter, so they are the same on every rank and after a resume; its
    distances are those of unit vectors, so that scores of another `score_range` than a cosine's
    are stretched to [-1, 1] for the draw.
    """

    def __init__(
        self, loss: str = "vse", margin: float = 0.2, cutoff: float = 1.7, seed: int = 0
    ) -> None:
        super().__init__()
        if loss not in ("vse", "trip", "infonce"):
            raise ValueError(f"unknown loss {loss!r}; known: vse, trip, infonce")
        self.loss = loss
        self.margin = margin
        self.cutoff = cutoff
        self.seed = seed
        self.hard_negatives = False
        self.scale = 1.0
        self.score_range = (-1.0, 1.0)
        if loss == "infonce":
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if loss == "trip":
            self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_args(cls, args) -> AlignmentLoss:
        """Return the loss that the arguments describe."""
        cutoff = 1.9 if getattr(args, "dataset", "f30k") == "coco" else 1.7
        return cls(args.loss, args.margin, cutoff, getattr(args, "seed", 0))

    @property
    def reads_few_pairs(self) -> bool:
        """Return True where gradient reaches no more than `pairs_read`, a few pairs a row."""
        return self.loss == "vse" and self.hard_negatives

    def pairs_read(self, similarity: Tensor, image_ids: Tensor) -> Tensor:
        """Return which entries of the matrix the loss gives gradient, bool (B, B)."""
        return hardest_pairs(_wide(similarity), negatives_mask(image_ids), self.margin)

    def forward(self, similarity: Tensor, image_ids: Tensor) -> Tensor:
        return self.scale * self._unscaled(_wide(similarity), negatives_mask(image_ids))

    def _unscaled(self, similarity: Tensor, negatives: Tensor) -> Tensor:
        if self.loss == "vse":
            return hinge_triplet(similarity, negatives, self.margin, self.hard_negatives)
        if self.loss == "infonce":
            factor = self.log_scale.exp().clamp(max=LARGEST_LOGIT_SCALE)
            return info_nce(similarity, negatives, factor)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
        self.draws.add_(1)
        low, high = self.score_range
        cosines = 2 * (similarity - low) / (high - low) - 1
        return distance_weighted_triplet(
            similarity, negatives, self.margin, self.cutoff, generator, cosines
        )


class GlobalLoss(nn.Module):
    """A loss of its own on the cosine of global embeddings: what re-ranking makes shortlists by."""

    def __init__(self, weight: float, loss: str = "vse", margin: float = 0.2) -> None:
        super().__init__()
        self.weight = weight
        self.criterion = AlignmentLoss(loss, margin)

    def forward(self, images: Tensor, texts: Tensor, image_ids: Tensor) -> Tensor:
        """Return the weighted loss of matching embeddings, (B, C) each, as a scalar."""
        return self.weight * self.criterion(_cosines(images, texts), image_ids)


@full_precision  # half precision would pick other hardest negatives
def _cosines(images: Tensor, texts: Tensor) -> Tensor:
    return normalize(images, dim=-1) @ normalize(texts, dim=-1).T


def _wide(similarity: Tensor) -> Tensor:
    return similarity.to(torch.promote_types(similarity.dtype, torch.float32))
