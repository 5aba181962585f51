"""Best matches of pairs on the CPU with their gradient, in C; PyTorch serves where it can't be.

The forward pass is `native.matches`. Nothing of it is kept but its arguments: native_gradients.c
computes a pair again, of which that is the cheap part, and finds of what few cosines the maxima
are. Pairs whose gradient is zero, as most are with hardest negatives or once a margin is met, are
passed over. The large products, words with patches and the gradients of both, are made image by
image. Exact, and the same bits in the same number of threads; formulas in docs/performance.md.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.model import compiled, native
from lib.model.gram import unit
from lib.model.product import multiply

LEAVES = "scores logits patches words fixed added".split()  # that gradient reaches
SAVED = (*LEAVES, "word_mask", "fixed_mask", "gram")
LANES = 16  # rows of weights are padded to that many
PRODUCT_BYTES = 4 * 2**20  # patch-word products alive at once: they stay near the caches
SIZES = "images captions patches tokens width fixed words kept sources fused_counts".split()
READ = """starts captions_of rows_of scores peaks peaks_by_patch gram cross squares word_mask
fixed_mask for_words for_tokens""".split()
WRITTEN = "products d_scores d_logits d_gram d_cross d_squares".split()


class _Call(ctypes.Structure):
    """`Gradients` of native_gradients.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in (*READ, *WRITTEN)),
    ]


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
    """Return what `kernels.fused_matches` tells, with gradient; None where PyTorch must serve.

    Gradient reaches scores (through the fused token), logits, patches, words, fixed and added; a
    second derivative raises. `gram` is a constant here, its gradient goes to the patches. Of equal
    maxima each takes its share, as in PyTorch. A gradient that is not finite makes all NaN.
    """
    fixed = unit(fixed)
    tensors = scores, logits, patches, words, fixed, added
    with torch.no_grad():
        gram = multiply(patches, patches.transpose(1, 2)) if gram is None else gram
        rest = word_mask, fixed, fixed_mask, k, added, fused_counts
        found = native.matches(scores, logits, patches, words, *rest, gram)
    if found is None:
        return None
    settings = {"kept": min(k, patches.shape[1]), "fused_counts": int(fused_counts)}
    return _Matches.apply(found, settings, *tensors, word_mask, fixed_mask, gram)


class _Matches(torch.autograd.Function):
    """Hands the matches on, and their gradient back."""

    @staticmethod
    def forward(
        ctx: Any, found: tuple[Tensor, Tensor], settings: dict[str, int], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        return found

    @staticmethod
    def backward(ctx: Any, for_words: Tensor, for_tokens: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph: this gradient would be taken for a constant
            raise RuntimeError(
                "the compiled scoring has no second derivative; with SEPS_NATIVE=0 PyTorch scores"
            )
        needed = zip(LEAVES, ctx.needs_input_grad[2:8], strict=True)
        wanted = {name for name, needs in needed if needs}
        finite = bool(for_words.sum().isfinite() and for_tokens.sum().isfinite())
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            saved: dict[str, Any] = dict(zip(SAVED, ctx.saved_tensors, strict=True))
            back = _Backward(**saved, settings=ctx.settings, wanted=wanted)
            if finite:
                back.run(for_words.contiguous(), for_tokens.contiguous())
            found = back.gradients()
        if not finite:
            found = {name: torch.full_like(one, torch.nan) for name, one in found.items()}
        return None, None, *(found.get(name) for name in LEAVES), None, None, None


@dataclass
class _Backward:
    """The gradients of one call that are `wanted`, by argument, summed image by image."""

    scores: Tensor
    logits: Tensor
    patches: Tensor
    words: Tensor
    fixed: Tensor
    added: Tensor | None
    word_mask: Tensor
    fixed_mask: Tensor
    gram: Tensor
    settings: dict[str, int]
    wanted: set[str]

    def __post_init__(self) -> None:
        self.real = self.words[self.word_mask]  # (W, C)
        self.caption_of = self.word_mask.nonzero()[:, 0]  # (W,)
        self.lengths = self.word_mask.sum(1)  # (T,)
        self.peaks = (self.logits - self.logits.amax(2, keepdim=True)).exp()  # (B_v, N_c, L)
        like = {name: getattr(self, name) for name in LEAVES} | {"words": self.real}
        # rows side by side, whatever the argument's strides
        self.out = {
            name: one.new_zeros(one.shape) for name, one in like.items() if name in self.wanted
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return those that are wanted, shaped as the arguments."""
        if "words" not in self.out:
            return self.out
        words = self.words.new_zeros(self.words.shape)
        words[self.word_mask] = self.out["words"]
        return self.out | {"words": words}

    def run(self, for_words: Tensor, for_tokens: Tensor) -> None:
        """Add up the gradients of all pairs, as many images at once as fit PRODUCT_BYTES."""
        reached = for_words.masked_fill(~self.word_mask, 0).any(2) | for_tokens.any(2)  # (B_v, T)
        row = 4 * (self.patches.shape[1] + self.fixed.shape[1])  # bytes
        size = max(torch.get_num_threads(), PRODUCT_BYTES // (row * max(1, len(self.real))))
        for first in range(0, len(self.patches), size):
            part = slice(first, first + size)
            if reached[part].any():
                self._add(part, reached[part], for_words[part], for_tokens[part])

    def _add(self, part: slice, reached: Tensor, for_words: Tensor, for_tokens: Tensor) -> None:
        """Add the gradients of some images and the captions that each is `reached` with."""
        sources = [self._sources(image) for image in range(part.start, part.start + len(reached))]
        rows = [self._rows(captions) for captions in reached]
        words = [self.real if one is None else self.real[one] for one in rows]
        products = self.real.new_empty(sum(map(len, words)), len(sources[0]))
        blocks = products.split([len(one) for one in words])
        for block, own, source in zip(blocks, words, sources, strict=True):
            multiply(own, source.T, block)
        self._match(part, reached, products, for_words, for_tokens)
        # where products were, their gradients are now
        for number, block in enumerate(blocks):
            self._add_tokens(part.start + number, block, words[number])
            if "words" in self.out and rows[number] is None:
                multiply(block, sources[number], self.out["words"], add=True)
            elif "words" in self.out:
                found = multiply(block, sources[number])
                self.out["words"].index_add_(0, rows[number], found)

    def _sources(self, image: int) -> Tensor:
        """Return what words are multiplied with: patches, added and fixed tokens, (R, C)."""
        added = () if self.added is None else (self.added[image],)
        return torch.cat([self.patches[image], *added, self.fixed[image]])

    def _rows(self, captions: Tensor) -> Tensor | None:
        """Return which real words the marked captions (T,) have, None where all are marked."""
        return None if bool(captions.all()) else captions[self.caption_of].nonzero()[:, 0]

    def _add_tokens(self, image: int, block: Tensor, words: Tensor) -> None:
        """Add what products with `words` (W, C) give the image's tokens; block (W, R)."""
        patches, fixed = self.patches.shape[1], self.fixed.shape[1]
        parts = block.split([patches, block.shape[1] - patches - fixed, fixed], 1)
        for name, part in zip(("patches", "added", "fixed"), parts, strict=True):
            if name in self.out and part.shape[1]:
                multiply(part.T, words, self.out[name][image], add=True)

    def _match(
        self,
        part: slice,
        reached: Tensor,
        products: Tensor,
        for_words: Tensor,
        for_tokens: Tensor,
    ) -> None:
        """Put gradients in the products' place, and add those of scores, logits and norms."""
        pairs = reached.nonzero()  # (P, 2), image by image
        lengths = self.lengths[pairs[:, 1]]
        peaks, patches = self.peaks[part], self.patches[part]
        width = -(-peaks.shape[1] // LANES) * LANES
        tensors = {
            "starts": pad(reached.sum(1).cumsum(0), (1, 0)),
            "captions_of": pairs[:, 1].int(),
            "rows_of": lengths.cumsum(0) - lengths,
            "scores": self.scores[part],
            "peaks": peaks,
            "peaks_by_patch": pad(peaks.transpose(1, 2), (0, width - peaks.shape[1])),
            "gram": self.gram[part],
            "word_mask": self.word_mask,
            "fixed_mask": self.fixed_mask[part],
            "for_words": for_words,
            "for_tokens": for_tokens,
        }
        written = {"products": products, **self._zeros(part)}
        if self.added is not None:
            tensors["cross"] = multiply(self.added[part], patches.transpose(1, 2))  # (b_v, N_c, L)
            tensors["squares"] = self.added[part].square().sum(2)  # (b_v, N_c)
        sizes = {
            "images": len(reached),
            "captions": reached.shape[1],
            "patches": patches.shape[1],
            "tokens": peaks.shape[1],
            "width": width,
            "fixed": self.fixed.shape[1],
            "words": self.word_mask.shape[1],
            "sources": products.shape[1],
            **self.settings,
        }
        _run(sizes, {key: one.contiguous() for key, one in tensors.items()} | written)
        for name in ("scores", "logits"):
            if name in self.out:
                self.out[name][part] = written["d_" + name]
        self._add_norms(part, written)

    def _zeros(self, part: slice) -> dict[str, Tensor]:
        """Return what gradients of some images are added to."""
        peaks = self.peaks[part]
        zeros = {
            "d_scores": self.scores.new_zeros(self.scores[part].shape),
            "d_logits": peaks.new_zeros(peaks.shape),
        }
        if self.added is not None:
            zeros["d_cross"] = peaks.new_zeros(peaks.shape)
            zeros["d_squares"] = peaks.new_zeros(peaks.shape[:2])
        if "patches" in self.out:
            zeros["d_gram"] = self.gram.new_zeros(self.gram[part].shape)
        return zeros

    def _add_norms(self, part: slice, written: dict[str, Tensor]) -> None:
        """Add what comes through the norms of tokens: V Vᵀ, A Vᵀ and |a|² of added tokens A."""
        for number, image in enumerate(range(len(self.patches))[part]):
            patches = self.patches[image]
            if "patches" in self.out:
                multiply(
                    2 * written["d_gram"][number], patches, self.out["patches"][image], add=True
                )
            if self.added is None:
                continue
            cross, added = written["d_cross"][number], self.added[image]
            if "patches" in self.out:
                multiply(cross.T, added, self.out["patches"][image], add=True)
            if "added" in self.out:
                multiply(cross, patches, self.out["added"][image], add=True)
                self.out["added"][image] += 2 * written["d_squares"][number, :, None] * added


def _run(sizes: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Match the pairs back, images shared out to PyTorch's number of threads."""
    call = _Call(**sizes, **{key: one.data_ptr() for key, one in tensors.items()})
    shares = compiled.shares(sizes["images"])
    compiled.call(
        "match_captions_back",
        [(ctypes.byref(call), ctypes.c_int64(a), ctypes.c_int64(b)) for a, b in shares],
    )
