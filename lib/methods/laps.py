"""LAPS: patches chosen under the caption, mean-of-maxima patch-word similarity."""

from __future__ import annotations

import argparse

from lib.methods.laps_family import LapsFamily
from lib.methods.registry import register_method
from lib.model.encoders import EncoderSource
from lib.model.losses import AlignmentLoss


@register_method("laps")
class LAPS(LapsFamily):
    """Linguistic-Aware Patch Slimming, SPEC 3 (Fu et al., CVPR 2024)."""

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> LAPS:
        criterion = AlignmentLoss.from_args(args)
        return cls(source.image(), source.text(), criterion, **cls.shared_settings(args))
