"""Patch tokens and words -> similarity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize, pad, softplus

from lib.batch import Rows, Tokens
from lib.errors import InputError
from lib.model.encoders import TextEncoder
from lib.model.gru import GRUTextEncoder
from lib.model.slimming import masked_mean

NEGATIVE_SLOPE = 0.1
DENSE_MATCHES = ("max_mean", "mean", "sentence")


def best_matches(affinity: Tensor, token_mask: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return each word's best token and each token's best word.

    affinity (B_v, T, N, M), token_mask broadcastable to (B_v, T, N), word_mask (T, M) ->
    (B_v, T, M) and (B_v, T, N); entries of masked words or tokens are meaningless.
    """
    for_words = affinity.masked_fill(~token_mask[..., None], -math.inf).amax(2)
    for_tokens = affinity.masked_fill(~word_mask[None, :, None, :], -math.inf).amax(3)
    return for_words, for_tokens


def masked_average(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the real entries of the last dimension."""
    mask = mask.expand_as(values)
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def largest(values: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest real entries in descending order and which of them are real.

    values (…, N), mask broadcastable -> two (…, k) tensors; where a row has fewer than k real
    entries the rest are 0 and marked False.
    """
    mask = mask.expand_as(values)
    width = values.shape[-1]
    top = values.masked_fill(~mask, -math.inf).topk(min(k, width), dim=-1).values
    real = top > -math.inf
    top = top.masked_fill(~real, 0)
    return pad(top, (0, k - top.shape[-1])), pad(real, (0, k - real.shape[-1]))


class Relevance(nn.Module):
    """R of SEPS eq. 5 on the k largest matches: values (…, N), mask -> (…,).

    `topk_mean`: their mean; `topk_mlp`: MLP(k → k → 1) of them in descending order, missing ones 0;
    `mean`: R = 0, which leaves the plain mean. The MLP's last bias is left out: it shifts every
    similarity alike, and no ranking or triplet loss sees it.
    """

    def __init__(self, kind: str, k: int) -> None:
        super().__init__()
        if kind not in ("topk_mean", "topk_mlp", "mean"):
            raise ValueError(f"unknown relevance {kind!r}; known: topk_mean, topk_mlp, mean")
        self.kind = kind
        self.k = k
        if kind == "topk_mlp":
            self.mlp = nn.Sequential(nn.Linear(k, k), nn.ReLU(), nn.Linear(k, 1, bias=False))

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest R of leaky affinities; None where an MLP has no bound."""
        return {"topk_mean": (-NEGATIVE_SLOPE, 1.0), "mean": (0.0, 0.0)}.get(self.kind)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "mean":
            return values.new_zeros(values.shape[:-1])
        top, real = largest(values, mask, self.k)
        if self.kind == "topk_mean":
            return masked_average(top, real)
        return self.mlp(top.to(self.mlp[0].weight.dtype)).squeeze(-1)


def best_affinities(
    cosines: Tensor, token_mask: Tensor, word_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `best_matches` of A = leaky_relu(cosines), which is taken of the maxima alone.

    It grows with the cosine, so that the maxima of one are those of the other.
    """
    for_words, for_tokens = best_matches(cosines, token_mask, word_mask)
    return leaky_relu(for_words, NEGATIVE_SLOPE), leaky_relu(for_tokens, NEGATIVE_SLOPE)


def mean_of_best(
    for_words: Tensor, for_tokens: Tensor, token_mask: Tensor, word_mask: Tensor
) -> Tensor:
    """Return mean_words max_tokens A + mean_tokens max_words A, (B_v, T). LAPS, SPEC 3.

    for_words (B_v, T, M) and for_tokens (B_v, T, N), masks as in `best_matches`, which gives them.
    """
    return masked_average(for_words, word_mask) + masked_average(for_tokens, token_mask)


def threshold_mean(
    cosines: Tensor, token_mask: Tensor, word_mask: Tensor, threshold: float
) -> Tensor:
    """Return mean_words mean{A near the word's best} + mean_tokens max_words A, (B_v, T).

    A = leaky_relu(cosines). A word averages the tokens whose affinity reaches max − threshold·|max|
    of its own, so that several patches can speak for one word. Masks as in `best_matches`. Source:
    improved LAPS, SPEC 10 (`thres`).
    """
    affinity = leaky_relu(cosines, NEGATIVE_SLOPE)
    best, for_tokens = best_matches(affinity, token_mask, word_mask)
    floor = (best - threshold * best.abs()).detach()[:, :, None]  # (B_v, T, 1, M)
    near = (affinity >= floor) & token_mask[..., None]  # (B_v, T, N, M)
    for_words = masked_average(affinity.transpose(2, 3), near.transpose(2, 3))  # (B_v, T, M)
    return masked_average(for_words, word_mask) + masked_average(for_tokens, token_mask)


def attention_mean(
    cosines: Tensor,
    word_mask: Tensor,
    token_queries: Tensor,
    word_queries: Tensor,
    temperature: Tensor | float = 1.0,
) -> Tensor:
    """Return Σ P∘A / N + Σ Q∘A / n, the attended affinities A of both directions, (B_v, T).

    A = leaky_relu(cosines). P = softmax over words of `token_queries` / τ, Q = softmax over tokens
    of `word_queries` / τ: products of normalised tokens with two projections of the words, shaped
    as the cosines (B_v, T, N, M). word_mask (T, M). Source: improved LAPS, SPEC 10.
    """
    affinity = leaky_relu(cosines, NEGATIVE_SLOPE)
    real = word_mask[None, :, None]  # (1, T, 1, M)
    over_words = (token_queries / temperature).masked_fill(~real, -math.inf).softmax(3)
    over_tokens = (word_queries / temperature).softmax(2)
    for_tokens = (over_words * affinity).sum(3).mean(2)  # (B_v, T)
    for_words = (over_tokens * affinity).sum(2)  # (B_v, T, M)
    return for_tokens + masked_average(for_words, word_mask)


def relevance_aware(
    for_words: Tensor,
    for_tokens: Tensor,
    token_mask: Tensor,
    word_mask: Tensor,
    word_relevance: Relevance,
    token_relevance: Relevance,
) -> Tensor:
    """Return mean(max A) + R(top-k of max A), both directions added, (B_v, T). SEPS eq. 5.

    Arguments as in `mean_of_best`.
    """
    return (
        mean_of_best(for_words, for_tokens, token_mask, word_mask)
        + word_relevance(for_words, word_mask)
        + token_relevance(for_tokens, token_mask)
    )


@dataclass
class MatchRows(Rows):
    """What `DenseMatch` needs of texts, a row each."""

    unit: Tensor  # normalised: words (B, N, C), or mean embeddings (B, C)
    mask: Tensor | None = None  # (B, N), of words
    gate: Tensor | None = None  # (B,), what an image adds to the raw weight


class DenseMatch(nn.Module):
    """How well dense texts fit captions, word against word: (b_v, b_t), SPEC 4.2.

    `max_mean`: mean over caption words of the best dense word's cosine + mean over dense words of
    the best caption word's; `mean`: cosine of the two mean embeddings; `sentence`: cosine of what
    the text encoder said of each before training (`Tokens.sentence`), ours. With `initial_weight`
    the term is multiplied by a learnt weight softplus(`raw_weight`) >= 0 that starts there; with
    `gate_width`, C, the image has a say: a linear function of how its patches and its dense text
    agree, channel by channel, is added to `raw_weight` (ours; it starts at 0).
    `text_encoder` makes the tokens; for `sentence` it is told to keep what it needs.
    """

    def __init__(
        self,
        kind: str,
        initial_weight: float | None = None,
        text_encoder: TextEncoder | GRUTextEncoder | None = None,
        gate_width: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in DENSE_MATCHES:
            raise ValueError(f"unknown dense match {kind!r}; known: {', '.join(DENSE_MATCHES)}")
        self.kind = kind
        if kind == "sentence":
            _keep_sentences(text_encoder)
        self.raw_weight = None
        if initial_weight is not None:
            inverse = initial_weight + math.log(-math.expm1(-initial_weight))  # of softplus
            self.raw_weight = nn.Parameter(torch.tensor(inverse))
        self.gate = None
        if gate_width is not None:
            self.gate = nn.Linear(gate_width, 1, bias=False)
            nn.init.zeros_(self.gate.weight)

    def prepare_images(self, images: Tokens) -> MatchRows:
        """Return what the term needs of images that own their dense texts, a row each."""
        rows = self.prepare(images.dense)
        if self.gate is not None:
            dense = normalize(masked_mean(images.dense.local, images.dense.mask), dim=-1)
            agreement = normalize(masked_mean(images.local, images.mask), dim=-1) * dense  # (B, C)
            rows.gate = self.gate(agreement)[:, 0]
        return rows

    def prepare(self, texts: Tokens) -> MatchRows:
        """Return what the term needs of dense texts or of captions, a row each."""
        if self.kind == "sentence":
            return MatchRows(normalize(texts.sentence, dim=-1))
        if self.kind == "mean":
            return MatchRows(normalize(masked_mean(texts.local, texts.mask), dim=-1))
        return MatchRows(normalize(texts.local, dim=-1), texts.mask)

    def forward(self, dense: MatchRows, captions: MatchRows) -> Tensor:
        match = self._match(dense, captions)
        if self.raw_weight is None:
            return match
        raw = self.raw_weight if dense.gate is None else self.raw_weight + dense.gate[:, None]
        return softplus(raw) * match

    def _match(self, dense: MatchRows, captions: MatchRows) -> Tensor:
        if self.kind in ("mean", "sentence"):
            with torch.autocast(dense.unit.device.type, enabled=False):
                return dense.unit @ captions.unit.T  # (b_v, b_t)
        cosines = torch.einsum("vnc,tmc->vtnm", dense.unit, captions.unit)
        cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
        masks = dense.mask[:, None], captions.mask
        return mean_of_best(*best_matches(cosines, *masks), *masks)


def _keep_sentences(encoder: TextEncoder | GRUTextEncoder | None) -> None:
    if not isinstance(encoder, TextEncoder):
        raise InputError(
            "--dense_match sentence needs a text encoder that knows something before training: "
            "give --text_encoder bert"
        )
    encoder.keep_sentences()
