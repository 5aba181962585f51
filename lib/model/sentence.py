"""A text backbone as it was before training: one embedding a text, which never changes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lib.model.chunks import ChunkedEncoder
from lib.model.text_backbones import text_hidden


class SentenceEncoder(ChunkedEncoder):
    """A frozen copy of a text backbone: ids (B, M), mask (B, M) -> mean word state (B, width).

    Its weights travel with the model's, so that a checkpoint embeds texts as training did.
    """

    def __init__(self, backbone: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.pad_id = pad_id

    def train(self, mode: bool = True) -> SentenceEncoder:
        """Stay in evaluation, whatever the model does: no dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.in_chunks(self._mean, ids, mask)

    def _mean(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Any = text_hidden(self.backbone, ids, mask, self.pad_id)  # (B, M, width)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        real = mask[..., None]
        return hidden.masked_fill(~real, 0).sum(1, dtype=wide) / real.sum(1).clamp(min=1)
