"""D2S-VSE as its released code has it: what the published checkpoints and numbers are of."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from lib.batch import length_mask
from lib.distributed import gather_sizes
from lib.methods.d2s_family import SHARED_FLAGS, DenseToSparse
from lib.methods.registry import register_method
from lib.model.encoders import EncoderSource
from lib.model.reasoning import unit

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on


@register_method("d2s_released")
class D2SReleased(DenseToSparse):
    """D2S-VSE with the released code's ways, SPEC 11; they differ from `d2s` in four places.

    The prompt is added whole in training and with length 1 in evaluation, where it hardly moves an
    embedding of length √C. The decoder reads padding as if it were words: a caption's score depends
    on the longest caption of its batch, and so on the batch size and order. BatchNorm's statistics
    count padding. And the teacher is in training mode with the rest: dropout, the batch's
    statistics, running statistics that drift.
    """

    also_reads = SHARED_FLAGS  # d2s's group has them
    pad_id: int = 0

    def __init__(self, image_encoder: Any, text_encoder: Any, *args: Any, **settings: Any) -> None:
        text_encoder.reads_padding = True  # before the teacher is made a copy of it
        super().__init__(image_encoder, text_encoder, *args, **settings)

    @classmethod
    def from_args(cls, args: argparse.Namespace, source: EncoderSource) -> Self:
        model = super().from_args(args, source)
        model.pad_id = getattr(args, "pad_id", 0)  # the tokenizer's
        return model

    def padded(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids up to the batch's longest text, in training the global batch's.

        What stands behind a text is [PAD]: it is read.
        """
        longest = int(lengths.max())
        if self.training:
            longest = max(gather_sizes(longest, ids.device))
        ids = pad(ids[:, :longest], (0, max(0, longest - ids.shape[1])))
        return ids.masked_fill(~length_mask(lengths, longest), self.pad_id), lengths

    def seen(self, mask: Tensor) -> Tensor:
        return mask.new_ones(mask.shape)

    def scaled(self, prompt: Tensor) -> Tensor:
        return prompt if self.training else unit(prompt)
