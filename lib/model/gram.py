"""Cosines between sums of patches and words, for every (image, caption) pair.

A token of a pair is a weighted sum of the image's patches, and only its weights differ from caption
to caption. Two exact forms of its cosine with a word, the cheaper one taken (docs/performance.md):

- direct: add the patches up, multiply by the words, divide by the norm;
- Gram: multiply patches by words, then add up those numbers; the norm of a sum follows from the
  image's Gram matrix, |Σ w_l v_l|² = wᵀ(V Vᵀ)w. No sum is ever built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.model.precision import full_precision

SMALLEST_NORM = 1e-12  # as torch's normalize
TYPICAL_WORDS = 14  # of a caption, [CLS] and [SEP] included


@dataclass
class PatchSums:
    """Tokens Σ_l weight_l · v_l / mass of every pair: weights (B_v, T, N, L), mass (B_v, T, N).

    `mass` None stands for 1.
    """

    weights: Tensor
    mass: Tensor | None = None

    def scaled(self, values: Tensor) -> Tensor:
        """Return values (B_v, T, N, …) divided by the mass."""
        if self.mass is None:
            return values
        return values / self.mass.reshape(*self.mass.shape, *[1] * (values.dim() - 3))

    def plus(self, weights: Tensor) -> PatchSums:
        """Return the sums with more weights on the same patches, (B_v, T or 1, N, L)."""
        return PatchSums(self.scaled(self.weights) + weights)


class PairTokens:
    """The tokens of every pair: sums of patches, and `fixed` ones that no caption changes.

    patches (B_v, L, C); fixed (B_v, F, C) normalised, F may be 0; gram (B_v, L, L) or None, which
    leaves the direct form alone.
    """

    def __init__(
        self,
        patches: Tensor,
        sums: Sequence[PatchSums],
        fixed: Tensor,
        gram: Tensor | None = None,
    ) -> None:
        self.patches = patches
        self.sums = sums
        self.fixed = fixed
        self.gram = gram

    def products(self, words: Tensor) -> Tensor:
        """Return products of the unit tokens with words, (B_v, T, N, M), in at least float32.

        words (T, M, C), cosines where they are normalised. Tokens: the sums in order, then `fixed`.
        """
        tokens = sum(one.weights.shape[2] for one in self.sums)
        _, patches, width = self.patches.shape
        if self.gram is not None and gram_pays(tokens, patches, width, words.shape[1]):
            return self._gram_form(words)
        return self._direct_form(words)

    def _gram_form(self, words: Tensor) -> Tensor:
        of_patches = _all_products(self.patches, words)  # (B_v, T, L, M)
        parts = [
            _divided(one.scaled(one.weights @ of_patches), norms)
            for one, norms in zip(self.sums, self._gram_norms, strict=True)
        ]
        return torch.cat([*parts, _all_products(self.fixed.to(words.dtype), words)], 2)

    @cached_property
    def _gram_norms(self) -> list[Tensor]:
        """Norms of the sums, (B_v, T, N) each."""
        norms = []
        for one in self.sums:
            squares = _quadratic_form(one.weights, self.gram)
            if one.mass is not None:
                squares = squares / one.mass.square()
            norms.append(squares.clamp(min=SMALLEST_NORM**2).sqrt())
        return norms

    def _direct_form(self, words: Tensor) -> Tensor:
        parts = []
        for tokens, norms in self._built:
            products = torch.einsum("vtnc,tmc->vtnm", tokens, words)
            parts.append(_divided(products.to(norms.dtype), norms))
        fixed = _all_products(self.fixed.to(words.dtype), words)
        return torch.cat([*parts, fixed.to(parts[0].dtype)], 2)

    @cached_property
    def _built(self) -> list[tuple[Tensor, Tensor]]:
        """The sums themselves, (B_v, T, N, C), and their norms (B_v, T, N), at least float32."""
        built = []
        # divided first: half precision has no room for weights that still await it
        weights = [one.scaled(one.weights) for one in self.sums]
        if not torch.is_grad_enabled():
            weights = [torch.cat(weights, 2)]  # one product; a graph would keep the copy
        for one in weights:
            flat = one.flatten(1, 2).to(self.patches.dtype)  # (B_v, T·N, L)
            tokens = (flat @ self.patches).unflatten(1, one.shape[1:3])
            wide = torch.promote_types(tokens.dtype, torch.float32)
            norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=wide)
            built.append((tokens, norms.clamp(min=SMALLEST_NORM)))
        return built


def gram_pays(tokens: int, patches: int, width: int, words: int) -> bool:
    """Return whether the Gram form multiplies fewer numbers a pair than the direct one."""
    direct = tokens * patches * width + tokens * width * words
    gram = patches * width * words + tokens * patches * patches + tokens * patches * words
    return gram < direct


def gram_matrix(patches: Tensor, tokens: int) -> Tensor | None:
    """Return V Vᵀ of each image, (B_v, L, C) -> (B_v, L, L), for the Gram form; else None.

    None where the form does not pay for captions, and in mixed precision: half precision would ruin
    the norms, and its matrix units make the direct form the faster one.
    """
    if torch.is_autocast_enabled(patches.device.type) or patches.dtype.itemsize < 4:
        return None
    if not gram_pays(tokens, patches.shape[1], patches.shape[2], TYPICAL_WORDS):
        return None
    return patches @ patches.transpose(1, 2)


@full_precision
def wide_gram(patches: Tensor) -> Tensor:
    """Return V Vᵀ of each image in at least float32, (B_v, L, C) -> (B_v, L, L)."""
    return patches @ patches.transpose(1, 2)


def _quadratic_form(weights: Tensor, gram: Tensor) -> Tensor:
    """Return wᵀGw of every w: weights (B_v, T, N, L), symmetric gram (B_v, L, L) -> (B_v, T, N).

    Its gradient in w is 2·Gw, which the forward pass has at hand: both factors w are taken for one,
    and a third large product is spared in the backward pass.

    NOTE: nothing here may ask `weights.requires_grad`: `torch.vmap` (`pair_scores`) hides it, and
    the norm's gradient would be dropped without a word.
    """
    fixed = weights.detach()
    turned = (fixed.flatten(1, 2) @ gram).view_as(weights)  # gradient to the Gram matrix alone
    squares = (turned * fixed).sum(-1)
    if not torch.is_grad_enabled():
        return squares
    once = (turned.detach() * weights).sum(-1)
    return squares + 2 * (once - once.detach())


def unit(tokens: Tensor) -> Tensor:
    """Return tokens divided by their norms."""
    return normalize(tokens, dim=-1, eps=SMALLEST_NORM)


def _all_products(tokens: Tensor, words: Tensor) -> Tensor:
    """Return products of every token with every word in one: (B_v, N, C), (T, M, C) -> pairs."""
    products = tokens.flatten(0, 1) @ words.flatten(0, 1).T  # (B_v·N, T·M)
    products = products.unflatten(1, words.shape[:2]).unflatten(0, tokens.shape[:2])
    return products.transpose(1, 2)  # (B_v, T, N, M)


def _divided(products: Tensor, norms: Tensor) -> Tensor:
    """Return products over norms; a zero token's are 0, and so is its gradient."""
    return products / norms.masked_fill(norms < 2 * SMALLEST_NORM, math.inf)[..., None]
