"""Best matches of pairs on the CPU, in C compiled at first use; PyTorch serves where it can't be.

The numbers and the arguments are those of kernels.py, which says why so little has to be read.
After one product of all words with all patches the rest is done pair by pair in native.c, in as
many threads as PyTorch has. Measured in docs/performance.md.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from lib.model import compiled
from lib.model.gram import SMALLEST_NORM
from lib.model.product import multiply

LANES = 8  # as in native.c
PRODUCT_BYTES = 4 * 2**20  # patch-word products alive at once: they stay near the caches
DIRECT_COST = 1.45  # of a multiply-add in PyTorch's direct form, its other passes included
LARGEST_EXPONENT = 60.0  # of a logit below its image's largest: exp(-60) is a normal float


class _Call(ctypes.Structure):
    """`Call` of native.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "images captions patches tokens width".split()),
        *((name, ctypes.c_int64) for name in "fixed words kept stride sources".split()),
        *((name, ctypes.c_void_p) for name in "scores peaks gram cross squares".split()),
        *((name, ctypes.c_void_p) for name in "products rows fixed_mask".split()),
        ("fused_counts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in "for_words for_tokens".split()),
    ]


def pays(tokens: int, patches: int, width: int, words: float, k: int) -> bool:
    """Return whether this is faster than PyTorch's direct form, as it is but for long captions."""
    ours = patches * width * words + tokens * k * (k / 2 + words)
    return ours < DIRECT_COST * tokens * width * (patches + words)


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

    It hands NaN on, takes logits that lie any distance apart, and is faster with long captions.
    """
    mean = float(word_mask.sum()) / max(1, len(words))
    if not pays(logits.shape[1], patches.shape[1], patches.shape[2], mean, k):
        return None
    tops = logits.amax(2, keepdim=True)
    apart = logits.numel() and float((tops - logits).amax())
    gram = patches @ patches.transpose(1, 2) if gram is None else gram.contiguous()
    if not apart < LARGEST_EXPONENT or not _finite(scores, patches, words, fixed, added, gram):
        return None
    for_words = scores.new_empty(*scores.shape[:2], words.shape[1])
    for_tokens = scores.new_empty(*scores.shape[:2], logits.shape[1] + 1 + fixed.shape[1])
    images = {
        "scores": scores,
        **_weighed(logits - tops, patches, added),
        "gram": gram,
        "fixed_mask": fixed_mask.contiguous(),
        "for_words": for_words,
        "for_tokens": for_tokens,
    }
    unit = normalize(fixed, dim=-1, eps=SMALLEST_NORM)
    sources = torch.cat([patches, unit] if added is None else [patches, added, unit], 1)
    sizes = {
        "captions": len(words),
        "patches": patches.shape[1],
        "tokens": logits.shape[1],
        "fixed": fixed.shape[1],
        "words": words.shape[1],
        "kept": min(k, patches.shape[1]),
        "fused_counts": int(fused_counts),
    }
    _match(images, sources, words[word_mask], _word_rows(word_mask), sizes)
    return for_words, for_tokens


def _weighed(logits: Tensor, patches: Tensor, added: Tensor | None) -> dict[str, Tensor | None]:
    """Return what the weights of aggregated tokens need of each image; `logits` are at most 0."""
    room = (0, -logits.shape[1] % LANES)  # rows of weights are padded with zeros to whole vectors
    peaks = pad(logits.exp().transpose(1, 2), room).contiguous()  # (B_v, L, width)
    if added is None:
        return {"peaks": peaks, "cross": None, "squares": None}
    cross = pad(patches @ added.transpose(1, 2), room).contiguous()  # (B_v, L, width)
    return {"peaks": peaks, "cross": cross, "squares": added.square().sum(-1).contiguous()}


def _word_rows(word_mask: Tensor) -> Tensor:
    """Return each word's row among the real words, -1 where it is none, int32 (T, M)."""
    rows = word_mask.flatten().cumsum(0).view_as(word_mask) - 1
    return torch.where(word_mask, rows, -1).to(torch.int32).contiguous()


def _match(
    images: dict[str, Tensor | None], sources: Tensor, real: Tensor, rows: Tensor, sizes: dict
) -> None:
    """Fill the images' for_words and for_tokens, as many images at once as fit PRODUCT_BYTES.

    `images` are tensors with a row an image; sources (B_v, R, C) and the real words (W, C) are
    multiplied, of which `rows` (T, M) says whose each is.
    """
    size = max(1, PRODUCT_BYTES // (4 * max(1, len(real)) * sources.shape[1]))
    for first in range(0, len(sources), size):
        part = slice(first, first + size)
        tensors = {
            key: None if one is None else one[part].contiguous() for key, one in images.items()
        }
        products = multiply(real, sources[part].flatten(0, 1).T)  # (W, images·R)
        counts = {
            "images": len(sources[part]),
            "width": images["peaks"].shape[2],
            "stride": products.shape[1],
            "sources": sources.shape[1],
        }
        _run({**sizes, **counts}, {**tensors, "products": products, "rows": rows})


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
