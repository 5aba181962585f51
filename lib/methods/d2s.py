"""D2S-VSE: images meet dense texts first, then captions, with what dense texts had taught."""

from __future__ import annotations

import argparse

from lib.methods.d2s_family import DenseToSparse, add_shared_arguments
from lib.methods.registry import register_method


@register_method("d2s")
class D2S(DenseToSparse):
    """Dense-to-sparse distilled visual-semantic embedding (ICCV 2025), SPEC 11.

    NOTE: unlike the released code (`d2s_released`) the prompt is added whole in training and
    evaluation alike, neither the decoder nor the BatchNorm sees padding, so that a caption's
    embedding is its own, and the teacher stays in evaluation mode.
    """

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        add_shared_arguments(group)

    def train(self, mode: bool = True) -> D2S:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self
