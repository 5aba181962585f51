"""Best matches of pairs on the CPU, in C compiled at first use; PyTorch serves where it can't be.

The numbers and the arguments are those of kernels.py, which says why so little has to be read. All
is done pair by pair in native_match.c, in as many threads as PyTorch has: short captions in the
Gram form, long ones in the direct form (gram.py). Measured in docs/performance.md.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from lib.model import compiled
from lib.model.gram import SMALLEST_NORM
from lib.model.product import multiply

LARGEST_EXPONENT = 60.0  # of a logit below its image's largest: exp(-60) is a normal float
# multiply-adds of large products that others cost as much time as, measured
NORM_COST, SUM_COST, BUILD_COST = 1.5, 1.5, 1.0
PANEL = 16  # words of long captions are padded to a multiple


class _Call(ctypes.Structure):
    """`Call` of native_pair.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "images captions patches channels words".split()),
        *((name, ctypes.c_int64) for name in "fixed kept tokens width sources".split()),
        ("fused_counts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in "scores peaks gram cross squares".split()),
        *((name, ctypes.c_void_p) for name in "patch_rows added_rows fixed_rows".split()),
        *((name, ctypes.c_void_p) for name in "word_rows word_mask direct fixed_mask".split()),
        *((name, ctypes.c_void_p) for name in "for_words for_tokens".split()),
    ]


def direct_pays(
    words: Tensor, tokens: int, sources: int, channels: int, k: int, making: float = 0.0
) -> Tensor:
    """Return for each number of words of a caption whether the direct form is the faster one.

    `making` is the price of a Gram matrix that is yet to be made: few captions are not worth it.
    """
    per_word = sources * channels + SUM_COST * tokens * k
    gram = per_word * words + NORM_COST * tokens * k * k / 2
    whole = (words + PANEL - 1) // PANEL * PANEL
    direct = tokens * channels * (BUILD_COST * k + whole)
    if direct.sum() < torch.minimum(direct, gram).sum() + making:
        return torch.ones_like(words, dtype=torch.bool)
    return direct < gram


def matches(
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
    """Return what `kernels.fused_matches` tells; None where PyTorch must serve.

    It hands NaN on and takes logits that lie any distance apart. `gram` must be theirs.
    """
    tops = logits.amax(2, keepdim=True)
    apart = logits.numel() and float((tops - logits).amax())
    k = min(k, patches.shape[1])
    direct, gram = _forms(patches, fixed, added, word_mask, logits.shape[1], k, gram)
    # where the squared norms of patches are finite, so are patches and Gram matrix
    seen = patches if gram is None else gram.diagonal(dim1=1, dim2=2)
    if not (apart < LARGEST_EXPONENT and _finite(scores, seen, words, fixed, added)):
        return None
    weighed = _weighed(logits - tops, patches, added)
    sizes = {
        **dict(zip(("images", "patches", "channels"), patches.shape, strict=True)),
        **dict(zip(("captions", "words"), words.shape[:2], strict=True)),
        "fixed": fixed.shape[1],
        "kept": k,
        "tokens": logits.shape[1],
        "width": weighed["peaks"].shape[2],
        "sources": _sources(patches, fixed, added),
        "fused_counts": int(fused_counts),
    }
    tensors: dict[str, Any] = {
        "scores": scores,
        **weighed,
        "gram": gram,
        "patch_rows": patches,
        "added_rows": added,
        "fixed_rows": normalize(fixed, dim=-1, eps=SMALLEST_NORM),
        "word_rows": words,
        **{"word_mask": word_mask, "direct": direct, "fixed_mask": fixed_mask},
        "for_words": scores.new_empty(*scores.shape[:2], words.shape[1]),
        "for_tokens": scores.new_empty(*scores.shape[:2], logits.shape[1] + 1 + fixed.shape[1]),
    }
    _run(sizes, {key: one if one is None else one.contiguous() for key, one in tensors.items()})
    return tensors["for_words"], tensors["for_tokens"]


def _sources(patches: Tensor, fixed: Tensor, added: Tensor | None) -> int:
    """Return how many rows of an image words are multiplied with."""
    return sum(one.shape[1] for one in (patches, added, fixed) if one is not None)


def _forms(
    patches: Tensor,
    fixed: Tensor,
    added: Tensor | None,
    word_mask: Tensor,
    tokens: int,
    k: int,
    gram: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return which captions are scored directly, bool (T,), and the Gram matrix if one is read."""
    making = 0.0 if gram is not None else float(patches.shape[1] ** 2 * patches.shape[2])
    sources, channels = _sources(patches, fixed, added), patches.shape[2]
    direct = direct_pays(word_mask.sum(1), tokens, sources, channels, k, making)
    if gram is None and not direct.all():
        gram = multiply(patches, patches.transpose(1, 2))
    return direct, gram


def _weighed(logits: Tensor, patches: Tensor, added: Tensor | None) -> dict[str, Tensor | None]:
    """Return what the weights of aggregated tokens need of each image; `logits` are at most 0."""
    lanes = compiled.library().lane_count()
    room = (0, -logits.shape[1] % lanes)  # rows of weights are padded with zeros to whole vectors
    peaks = pad(logits.exp().transpose(1, 2), room)  # (B_v, L, width)
    if added is None:
        return {"peaks": peaks, "cross": None, "squares": None}
    cross = pad(multiply(patches, added.transpose(1, 2)), room)  # (B_v, L, width)
    return {"peaks": peaks, "cross": cross, "squares": added.square().sum(-1)}


def _finite(*tensors: Tensor | None) -> bool:
    """Return whether all numbers are finite: the compiler took it for granted that they are."""
    return all(bool(one.sum().isfinite()) for one in tensors if one is not None)


def _run(sizes: dict[str, int], tensors: dict[str, Tensor | None]) -> None:
    """Match the captions in PyTorch's number of threads."""
    pointers = {key: one.data_ptr() for key, one in tensors.items() if one is not None}
    call = ctypes.byref(_Call(**sizes, **pointers))
    shares = compiled.shares(sizes["captions"])
    compiled.call(
        "match_captions",
        [(call, ctypes.c_int64(first), ctypes.c_int64(last)) for first, last in shares],
    )
