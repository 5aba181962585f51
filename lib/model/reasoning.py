"""Similarity vectors of image and caption, and what SGR and SAF make of them. SPEC 11 (SGRAF)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from lib.distributed import gather_rows, gather_sizes, world_size
from lib.errors import InputError
from lib.model.alignment import NEGATIVE_SLOPE, masked_average
from lib.model.pooling import GlobalBatchNorm1d
from lib.model.precision import full_precision

TINY = 1e-8
SMOOTH = 9.0  # sharpness of a word's attention to the regions


def unit(values: Tensor, dim: int = -1) -> Tensor:
    """Return values / (‖values‖₂ + 1e-8); of zeros 0, with gradient 0."""
    return values / (torch.linalg.vector_norm(values, dim=dim, keepdim=True) + TINY)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer that starts uniform within ±sqrt(6 / (inputs + outputs)), bias 0."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


# --- one embedding of a whole image or caption -------------------------------------------------


class SelfAttention(nn.Module):
    """Tokens weighed by how they agree with their mean: (B, N, C), mask (B, N) -> unit (B, C).

    softmax over tokens of w · (tanh(W_l token) ∘ tanh(W_g mean)), both tanh after a norm where a
    subclass has one. NOTE: w has no bias, which the softmax would cancel.
    """

    def __init__(self, channels: int, dropout: float = 0.4) -> None:
        super().__init__()
        self.local = linear(channels, channels)
        self.overall = linear(channels, channels)
        self.common = linear(channels, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        mean = masked_average(tokens.transpose(1, 2), mask[:, None])  # (B, C)
        local = self.dropout(self.norm_local(self.local(tokens), mask).tanh())
        overall = self.dropout(self.norm_overall(self.overall(mean)).tanh())
        logits = self.common(local * overall[:, None]).squeeze(-1)  # (B, N)
        weights = logits.masked_fill(~mask, -math.inf).softmax(1)
        return unit(torch.einsum("bn,bnc->bc", weights, tokens))

    def norm_local(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return what stands in the tanh of the tokens, (B, N, C)."""
        return features

    def norm_overall(self, features: Tensor) -> Tensor:
        """Return what stands in the tanh of the mean, (B, C)."""
        return features


class ImageSelfAttention(SelfAttention):
    """`SelfAttention` of regions or patches with BatchNorms, which run over all ranks.

    That of the tokens has a channel per region index, as released, so that an image's embedding
    depends on the order of its regions and their number is fixed; or with `norm` "channel" one per
    feature channel, which is neither. Raises InputError where images have other than `regions`.
    """

    def __init__(
        self, channels: int, regions: int, norm: str = "region", dropout: float = 0.4
    ) -> None:
        super().__init__(channels, dropout)
        if norm not in ("region", "channel"):
            raise ValueError(f"unknown norm {norm!r}; known: region, channel")
        self.regions = regions if norm == "region" else None
        self.local_norm = GlobalBatchNorm1d(self.regions or channels)
        self.overall_norm = GlobalBatchNorm1d(channels)
        # a BatchNorm per feature channel cancels the bias before it
        self.overall = linear(channels, channels, bias=False)
        if self.regions is None:
            self.local = linear(channels, channels, bias=False)

    def norm_local(self, features: Tensor, mask: Tensor) -> Tensor:
        if self.regions is None:
            rows = self.local_norm(features[mask])  # (tokens of all rows, C)
            normed = rows.new_zeros(features.shape)
            normed[mask] = rows
            return normed
        images, regions, channels = features.shape
        if regions != self.regions:
            raise InputError(
                f"--num_regions {self.regions}: the images have {regions} regions; give that "
                "number, or --sgraf_norm channel, which asks for none"
            )
        rows = features.transpose(1, 2).flatten(0, 1)  # (B·C, N)
        real = mask.repeat_interleave(channels, 0)
        return self.local_norm(rows, real).unflatten(0, (images, channels)).transpose(1, 2)

    def norm_overall(self, features: Tensor) -> Tensor:
        return self.overall_norm(features)


# --- similarity vectors ------------------------------------------------------------------------


def word_contexts(regions: Tensor, words: Tensor, region_mask: Tensor, word_mask: Tensor) -> Tensor:
    """Return what each word gathers from each image, of length 1, (b_v, b_t, M, C). SCAN's t2i.

    regions (b_v, L, C) and words (b_t, M, C) of length 1, with masks. A word's attention is its
    affinity with each region, divided by that of all the caption's words, softmax over regions.
    """
    affinity = torch.einsum("tmc,vlc->vtml", words, regions)
    affinity = leaky_relu(affinity, NEGATIVE_SLOPE).masked_fill(~word_mask[None, :, :, None], 0)
    logits = SMOOTH * unit(affinity, dim=2)  # over the words
    weights = logits.masked_fill(~region_mask[:, None, None], -math.inf).softmax(3)
    return unit(torch.einsum("vtml,vlc->vtmc", weights, regions))


class SimilarityNodes(nn.Module):
    """Image and caption -> nodes (b_v, b_t, 1 + M, S): how they differ as wholes, then by word.

    Each node is a linear map of squared differences per channel, of length 1.
    """

    def __init__(self, channels: int, sim_dim: int) -> None:
        super().__init__()
        self.overall = linear(channels, sim_dim)
        self.local = linear(channels, sim_dim)

    def forward(
        self,
        image: Tensor,
        regions: Tensor,
        region_mask: Tensor,
        text: Tensor,
        words: Tensor,
        word_mask: Tensor,
    ) -> Tensor:
        """Take image (b_v, C), regions (b_v, L, C), text (b_t, C), words (b_t, M, C), all unit."""
        contexts = word_contexts(regions, words, region_mask, word_mask)
        local = self.local((contexts - words).square())  # (b_v, b_t, M, S)
        overall = self.overall((image[:, None] - text).square())[:, :, None]
        return unit(torch.cat([overall, local], dim=2).to(_at_least_float(overall.dtype)))


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def node_mask(word_mask: Tensor) -> Tensor:
    """Return which nodes of each caption are real, (b_t, 1 + M): the whole, then its words."""
    return torch.cat([word_mask.new_ones(len(word_mask), 1), word_mask], dim=1)


# --- similarity graph reasoning ----------------------------------------------------------------


class GraphStep(nn.Module):
    """One step over the full graph: queries (…, Q, S), nodes (…, N, S) -> (…, Q, S).

    ReLU(W_s · softmax over nodes((W_q queries)(W_k nodes)ᵀ) · nodes). NOTE: W_k has no bias, which
    the softmax would cancel; it goes to the queries' side with W_q, as one map.
    """

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.query = linear(sim_dim, sim_dim)
        self.key = linear(sim_dim, sim_dim, bias=False)
        self.out = linear(sim_dim, sim_dim)

    def forward(self, queries: Tensor, nodes: Tensor, mask: Tensor) -> Tensor:
        both = self.query.weight.T @ self.key.weight  # (S, S)
        turned = queries @ both + self.query.bias @ self.key.weight
        edges = turned @ nodes.transpose(-1, -2)  # (…, Q, N)
        edges = edges.masked_fill(~mask[..., None, :], -math.inf).softmax(-1)
        return self.out(edges @ nodes).relu()


class GraphReasoning(nn.Module):
    """Nodes (b_v, b_t, N, S), mask (b_t, N) -> (b_v, b_t, S): node 0 after all steps."""

    def __init__(self, sim_dim: int, steps: int = 3) -> None:
        super().__init__()
        self.steps = nn.ModuleList(GraphStep(sim_dim) for _ in range(steps))

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        return self._reasoned(nodes, mask)

    @full_precision
    def _reasoned(self, nodes: Tensor, mask: Tensor) -> Tensor:
        for step in self.steps[:-1]:
            nodes = step(nodes, nodes, mask)
        return self.steps[-1](nodes[:, :, :1], nodes, mask).squeeze(2)


# --- similarity attention filtration -----------------------------------------------------------


class CaptionBatchNorm(nn.Module):
    """BatchNorm of one channel whose training statistics are those of each caption by itself.

    values (B_v, B_t, N), mask (B_t, N) -> (B_v, B_t, N). A caption's mean and variance run over all
    its real values with all images, those of other ranks too; the running statistics move once a
    caption, in the captions' order, as if they came one after the other (momentum 0.1, unbiased
    variance). Evaluation uses the running statistics. Source: SPEC 11.
    """

    def __init__(self, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = self._statistics(values, mask)
            mean, variance = mean[:, None], variance[:, None]  # (B_t, 1)
        return (values - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias

    def _statistics(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        images = sum(gather_sizes(len(values), values.device))
        count = images * mask.sum(1)  # (B_t,)
        mean = _over_images(values.masked_fill(~mask, 0).sum(2)) / count
        centred = (values - mean[:, None]).masked_fill(~mask, 0)
        variance = _over_images(centred.square().sum(2)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        return mean, variance

    @torch.no_grad()
    def _track(self, means: Tensor, variances: Tensor) -> None:
        """Move the running statistics by each caption's in turn, in closed form."""
        keep = 1 - self.momentum
        later = torch.arange(len(means) - 1, -1, -1, device=means.device)
        weights = self.momentum * keep ** later.to(means.dtype)
        for running, new in ((self.running_mean, means), (self.running_var, variances)):
            running.mul_(keep ** len(means)).add_((weights * new).sum())


def _over_images(values: Tensor) -> Tensor:
    """Return the sum over all ranks' images, (B_v, B_t) -> (B_t,)."""
    return gather_rows(values.sum(0, keepdim=True), [1] * world_size()).sum(0)


class AttentionFiltration(nn.Module):
    """Nodes (b_v, b_t, N, S), mask (b_t, N) -> similarity vectors (b_v, b_t, S) of length 1.

    Nodes weighed by a gate, sigmoid(BatchNorm(w · node)), divided by the sum of all gates. In
    training `nodes` must hold all images of this rank, as the BatchNorm asks. NOTE: w has no bias,
    which the BatchNorm would cancel.
    """

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.gate = linear(sim_dim, 1, bias=False)
        self.norm = CaptionBatchNorm()

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        return self._filtered(nodes, mask)

    @full_precision
    def _filtered(self, nodes: Tensor, mask: Tensor) -> Tensor:
        gates = self.norm(self.gate(nodes).squeeze(-1), mask).sigmoid().masked_fill(~mask, 0)
        weights = gates / (gates.sum(-1, keepdim=True) + TINY)  # (b_v, b_t, N)
        return unit(torch.einsum("vtn,vtns->vts", weights, nodes))
