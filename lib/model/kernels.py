"""Patch slimming and max matching of every image-caption pair, fused for evaluation.

`fused_matches` gives the numbers of gram.py, which serves everywhere else, through the programs of
triton_programs.py that never build an aggregated token nor write what it is made of. With P the
patches of an image, W the weights of its aggregated tokens under a caption, E its words, everything
comes from two products that no choice of patches changes (Gram form, exact algebra):

    W·P·Eᵀ = W·(P·Eᵀ),    |W·P|² = rowsum(W·(P·Pᵀ) ∘ W)

and of both only the rows and columns of kept patches are read: k/L of the one, (k/L)² of the other.

What is computed where: P·Pᵀ, once an image and call, and P·Eᵀ of all pairs are ordinary large
products, so cuBLAS makes them at full rate; inside a program they would be paid in Triton's slower
float32 dot, and read P, 400 kB an image, again for each pair. P·Eᵀ costs B_v·L·T·M floats, written
and read once (37 kB a pair at L = 196, M = 24, against 5 MFLOP to make them: memory is not the
limit), and is made for as many captions at once as fit PRODUCT_BYTES. The patches are ordered kept
first by a program of their own, so that the others walk dense blocks.

The programs' products are IEEE float32. PyTorch's products follow torch.backends.cuda.matmul, IEEE
unless somebody changed it.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from lib.model import compiled, native, native_gradients
from lib.model.alignment import NEGATIVE_SLOPE, best_matches
from lib.program import is_out_of_memory

try:
    import triton

    from lib.model.triton_programs import match_aggregated, match_fused, order_patches
except ImportError:  # macOS, Windows and CPU wheels of torch come without it
    triton = None

PAIRS = 2**16  # of a call: scores of 50 MB at L = 196
PAIRS_ON_CPU = 2**12
PAIRS_WITH_GRADIENT = 2**14  # scores, all that is kept of a pair, of 13 MB at L = 196
PRODUCT_BYTES = 256 * 2**20  # patch-word products alive at once
FUSED_BLOCK = 16  # columns of the fused token's tiles, which are as high as the dropped patches
# A float32 dot without tensor cores holds its operands in registers, so BLOCK_K is small.
# Tiles of 32 keep a thread at 128 registers where those of 64 take 255 (ptxas, sm_90a).
LARGEST_TILE = 32
AGGREGATED_TILES = {"BLOCK_L": LARGEST_TILE, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


_failed: set[torch.device] = set()  # where a program did not build at the size it was asked for


def is_available(device: torch.device) -> bool:
    """Return whether `fused_matches` runs there: on CUDA, on the CPU where there is a C compiler.

    Under TRITON_INTERPRET=1 Triton's interpreter runs the programs anywhere. Where Triton can't
    build a program (no C compiler, an old GPU), one warning says so.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device in _failed:
        return False
    if _interpreted():
        return True
    if device.type == "cpu":
        return compiled.is_available()
    return triton is not None and device.type == "cuda" and _builds(device)


def _interpreted() -> bool:
    return triton is not None and not isinstance(order_patches, triton.JITFunction)


@functools.cache
def _builds(device: torch.device) -> bool:
    """Return whether all three programs build and run on the device at a small size; asked once."""
    patches = torch.ones(1, 4, 4, device=device)
    one, mask = patches[:, :1], patches[:, :1, 0] > 0
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # as the call itself
            for added in (None, one):
                matches = _matches(one, one, patches, one, mask, one, mask, 2, added)
                matches[0].sum().item()  # waits, so that a fault shows here
    except Exception as error:  # Triton raises what its compilers and drivers do
        if is_out_of_memory(error):
            raise  # it may build when there is room
        _tell(error)
        return False
    return True


def _tell(error: BaseException) -> None:
    while error.__cause__ is not None:  # a fault in a helper is told as the line that calls it
        error = error.__cause__
    lines = str(error).splitlines() or [type(error).__name__]
    reason = lines[-1] if lines[0].startswith("at ") else lines[0]  # after the source's lines
    print(f"warning: no fused scoring, PyTorch does it ({reason:.200})", file=sys.stderr)


def most_pairs(device: torch.device) -> int:
    """Return how many pairs a call is best given."""
    if torch.is_grad_enabled():
        return PAIRS_WITH_GRADIENT
    return PAIRS if device.type == "cuda" or _interpreted() else PAIRS_ON_CPU


def serves(patches: Tensor) -> bool:
    """Return whether `fused_matches` may score these patches now.

    With gradient it does so on the CPU in float32 alone.
    """
    if torch.is_grad_enabled():
        mixed = torch.is_autocast_enabled(patches.device.type)
        plain = patches.is_cpu and patches.dtype == torch.float32 and not mixed
        return plain and not _interpreted() and is_available(patches.device)
    return patches.dtype != torch.float64 and is_available(patches.device)


def token_mask(fixed_mask: Tensor, aggregated: int, fused_takes_part: bool) -> Tensor:
    """Return which of [N_c aggregated; fused; F fixed] take part, bool (B_v, 1, N_c + 1 + F)."""
    mask = fixed_mask.new_ones(len(fixed_mask), aggregated + 1)
    mask[:, aggregated] = fused_takes_part
    return torch.cat([mask, fixed_mask], 1)[:, None]


def fused_matches(
    scores: Tensor,
    logits: Tensor,
    patches: Tensor,
    words: Tensor,
    word_mask: Tensor,
    fixed: Tensor,
    fixed_mask: Tensor,
    k: int,
    added: Tensor | None = None,
    fused_counts: bool = True,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return each word's best token (B_v, T, M) and each token's best word (B_v, T, N_c + 1 + F).

    None where PyTorch must serve: on the CPU see `native.matches`, and `native_gradients.matches`
    where a gradient is asked for; on CUDA, with a warning and from then on, where a program does
    not build.

    scores (B_v, T, L) rank the patches, of which the `k` best are kept; logits (B_v, N_c, L) weigh
    the kept ones, the scores the dropped ones; patches (B_v, L, C); words (T, M, C) normalised,
    word_mask (T, M); fixed (B_v, F, C) are tokens that no caption changes, fixed_mask (B_v, F);
    added (B_v, N_c, C) is added to the aggregated tokens before they are normalised. Where nothing
    is dropped the fused token is a zero, which words see only with `fused_counts` (LAPS; SEPS
    leaves it out). `gram` (B_v, L, L) float32, the patches' products, is made where not given, and
    on CUDA always. Entries of masked words and tokens are meaningless. Affinities in [-1, 1],
    float32, also under autocast: half-precision arguments are taken as float32.
    Raises ValueError where the programs never run, and where a gradient would be lost.
    Source: LAPS (CVPR 2024) and SEPS eq. 4-5, SPEC 3 and 4.
    """
    tensors = [one for one in (scores, logits, patches, words, fixed, added) if one is not None]
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        _check_gradient(patches)
        rest = word_mask, fixed, fixed_mask, k, added, fused_counts
        return native_gradients.matches(scores, logits, patches, words, *rest, gram)
    _check(patches.device)
    device = scores.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scores, logits, patches, words, fixed = (
            one.float() for one in (scores, logits, patches, words, fixed)
        )
        added = None if added is None else added.float()
        rest = word_mask, fixed, fixed_mask, k, added, fused_counts
        if device.type == "cpu" and not _interpreted():
            return native.matches(scores, logits, patches, words, *rest, gram)
        return _tried(scores, logits, patches, words, *rest)


def _tried(*arguments) -> tuple[Tensor, Tensor] | None:
    """Return `_matches`, or None from the first failure on."""
    try:
        return _matches(*arguments)
    except Exception as error:  # a program of this size that the small probe did not show
        if is_out_of_memory(error):
            raise
        _failed.add(arguments[0].device)
        _tell(error)
        return None


def _matches(
    scores: Tensor,
    logits: Tensor,
    patches: Tensor,
    words: Tensor,
    word_mask: Tensor,
    fixed: Tensor,
    fixed_mask: Tensor,
    k: int,
    added: Tensor | None = None,
    fused_counts: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return what `fused_matches` tells, by the Triton programs; all tensors float32."""
    with torch.cuda.device_of(scores):
        images = _prepare(logits, patches, fixed, fixed_mask, added)
        size = max(1, PRODUCT_BYTES // (4 * images.sources[..., 0].numel() * words.shape[1]))
        parts = [
            _match(
                images,
                scores[:, first : first + size].contiguous(),
                words[first : first + size],
                word_mask[first : first + size].contiguous(),
                min(k, patches.shape[1]),
                fused_counts,
            )
            for first in range(0, len(words), size)
        ]
    for_words, for_tokens = zip(*parts, strict=True)
    return torch.cat(for_words, 1), torch.cat(for_tokens, 1)


def _check(device: torch.device) -> None:
    if not is_available(device):
        raise ValueError("fused_matches needs a CUDA device and Triton, or a CPU and a C compiler")


def _check_gradient(patches: Tensor) -> None:
    _check(patches.device)
    if not serves(patches):
        raise ValueError(
            "fused_matches has a backward pass on the CPU in float32 alone: elsewhere call it "
            "under torch.no_grad()"
        )


@dataclass
class _Images:
    """What is made once an image; A is N_c where vectors are added, else 0."""

    sources: Tensor  # (B_v, L + A + F, C) patches; added vectors; normalised fixed tokens
    gram: Tensor  # (B_v, L + A, L) products of patches and added vectors with patches
    squares: Tensor | None  # (B_v, A) squared norms of the added vectors
    logits: Tensor  # (B_v, N_c, L)
    fixed_mask: Tensor  # (B_v, F)


def _prepare(
    logits: Tensor, patches: Tensor, fixed: Tensor, fixed_mask: Tensor, added: Tensor | None
) -> _Images:
    rows = patches if added is None else torch.cat([patches, added], 1)  # (B_v, L + A, C)
    return _Images(
        torch.cat([rows, normalize(fixed, dim=-1)], 1),
        rows @ patches.transpose(1, 2),
        None if added is None else added.square().sum(-1),
        logits.contiguous(),
        fixed_mask,
    )


def _match(
    images: _Images,
    scores: Tensor,
    words: Tensor,
    word_mask: Tensor,
    k: int,
    fused_counts: bool,
) -> tuple[Tensor, Tensor]:
    """Return the best matches of all images with a few captions."""
    flat = images.sources.flatten(0, 1) @ words.flatten(0, 1).T  # (B_v·R, T·M)
    products = flat.view(*images.sources.shape[:2], *word_mask.shape)  # (B_v, R, T, M)
    for_words, for_tokens = _launch(images, scores, products, word_mask, k)
    best = for_words.amax(2)  # (B_v, T, M)
    if fused_counts and k == scores.shape[-1]:
        best = best.clamp(min=0)  # the fused token is a zero
    fixed = products[:, images.gram.shape[1] :].transpose(1, 2)  # (B_v, T, F, M)
    if fixed.shape[2]:
        per_word, per_token = best_matches(fixed, images.fixed_mask[:, None], word_mask)
        best = torch.maximum(best, per_word)
        for_tokens = torch.cat([for_tokens, per_token], 2)
    # monotone, so after the maxima; cosines leave [-1, 1] only where a norm is all rounding error
    best, for_tokens = (leaky_relu(one.clamp(-1, 1), NEGATIVE_SLOPE) for one in (best, for_tokens))
    return best, for_tokens


def _launch(
    images: _Images, scores: Tensor, products: Tensor, word_mask: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return cosines of all tokens but the fixed ones: best for words, a slot a block of tokens.

    (B_v, T, slots, M) for words and (B_v, T, N_c + 1) for tokens.
    """
    tokens, longest = images.logits.shape[1], word_mask.shape[1]
    blocks = triton.cdiv(tokens, block_sizes(tokens, longest)[0])
    dropped = scores.shape[-1] - k
    slots = blocks + (dropped > 0)
    shared = {
        "order": _ordered(scores, k),
        "gram": images.gram,
        "products": products,
        "word_mask": word_mask.view(torch.uint8),
        "for_words": scores.new_empty(*scores.shape[:2], slots, longest),
        # the fused one stays 0 if k == L
        "for_tokens": scores.new_zeros(*scores.shape[:2], tokens + 1),
        "slots": slots,
        "k": k,
        "L": scores.shape[-1],
        "G": images.gram.shape[1],
        "R": products.shape[1],
        "T": len(word_mask),
        "M": longest,
        "N": tokens,
    }
    _launch_aggregated(images, shared, scores[..., 0].numel(), blocks)
    if dropped:
        _launch_fused(scores, shared, dropped)
    return shared["for_words"], shared["for_tokens"]


def _ordered(scores: Tensor, k: int) -> Tensor:
    """Return the patches of each pair, the k best first, int32 (B_v, T, L)."""
    order = torch.empty_like(scores, dtype=torch.int32)
    pairs, num_patches = scores[..., 0].numel(), scores.shape[-1]
    width = triton.next_power_of_2(num_patches)
    warps = max(1, min(4, width // 256))  # one warp counts without a barrier
    order_patches[(pairs,)](scores, order, num_patches, k, WIDTH=width, num_warps=warps)
    return order


def _launch_aggregated(images: _Images, shared: dict[str, Any], pairs: int, blocks: int) -> None:
    """Write the aggregated tokens' cosines; `shared` are the arguments of both programs."""
    block_n, block_m = block_sizes(shared["N"], shared["M"])
    match_aggregated[(pairs * blocks,)](
        **shared,
        logits=images.logits,
        squares=images.gram if images.squares is None else images.squares,
        blocks=blocks,
        ADDED=images.squares is not None,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        WORD_BLOCKS=triton.cdiv(shared["M"], block_m),
        **AGGREGATED_TILES,
    )


def _launch_fused(scores: Tensor, shared: dict[str, Any], dropped: int) -> None:
    """Write the cosines of the fused token, the softmax average of `dropped` patches."""
    height = max(16, triton.next_power_of_2(dropped))
    match_fused[(scores[..., 0].numel(),)](
        **shared,
        scores=scores,
        HEIGHT=height,
        BLOCK=FUSED_BLOCK,
        WORD_BLOCKS=triton.cdiv(shared["M"], FUSED_BLOCK),
        num_warps=4 if height <= 256 else 8,  # what spills no registers
    )


def block_sizes(tokens: int, longest: int) -> tuple[int, int]:
    """Return how many aggregated tokens and how many words a program multiplies at once.

    Powers of two from 16, tl.dot's smallest side, to `LARGEST_TILE`, whatever L, N_c and M are.
    """
    sides = (triton.next_power_of_2(size) for size in (tokens, longest))
    return tuple(max(16, min(LARGEST_TILE, side)) for side in sides)
