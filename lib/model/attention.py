"""Where an image encoder looks: the attention that its [CLS] pays to patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib.errors import InputError
from lib.model.encoders import ImageEncoder
from lib.model.image_backbones import with_positions


def cls_attention(encoder: ImageEncoder, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what takes pixels (B, 3, H, W) to (B, L): [CLS]'s attention, summing to 1 an image.

    It is that of the last layer, the mean of its heads. Raises InputError for an encoder without
    [CLS], or not of transformers, whose attention can't be read.
    """
    backbone, layout = encoder.backbone, encoder.layout
    if not layout.has_cls:
        raise InputError(f"--attention_kept: {type(backbone).__name__} has no [CLS] that attends")
    reader = _reader(backbone).to(device).eval()

    @torch.inference_mode()
    def attention(pixels: Tensor) -> Tensor:
        normal = encoder.normalise(pixels.to(device))
        maps = with_positions(reader, normal, output_attentions=True).attentions
        of_patches = maps[-1][:, :, 0, layout.first_patch :].mean(1)  # (B, L)
        return of_patches / of_patches.sum(1, keepdim=True)

    return attention


def _reader(backbone: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the backbone whose attention is written out: fused kernels keep it."""
    from transformers import AutoModel  # slow to import

    try:
        reader = AutoModel.from_config(backbone.config, attn_implementation="eager")
    except (AttributeError, ValueError):
        told = f"the attention of {type(backbone).__name__} can't be read"
        raise InputError(f"--attention_kept: {told}; leave out the flag") from None
    missing, unexpected = reader.load_state_dict(backbone.state_dict(), strict=False)
    if unexpected or any(not name.startswith("pooler.") for name in missing):
        raise InputError(f"--attention_kept: {type(backbone).__name__} can't be built anew")
    return reader
