"""Which patches a method keeps for each pair of image and caption, and the scores that say so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PatchChoice:
    """Maps over patches, each (B_v, B_t, L), by the field's names; a branch is named as its text.

    The first branch is that of the caption.
    """

    kept: dict[str, Tensor]  # bool, by branch
    scores: dict[str, Tensor]  # a branch's significance, then the parts that it is made of
