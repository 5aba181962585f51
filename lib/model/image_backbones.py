"""What an image backbone's output means: patch grid, [CLS], registers, width, for any family."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from lib.errors import InputError, first_line
from lib.memory import check_fits
from lib.model.backbones import freeze_unreached

CLS_NAMES = ("cls_token", "class_embedding", "class_token")  # parameters that are a [CLS]
NAFLEX = "siglip2_vision_model"  # reads patches that were cut before it, and their grid


@dataclass(frozen=True)
class TokenLayout:
    """Where in a sequence of tokens what lies: [CLS] first, then registers, then the patches.

    DeiT's distillation token counts as a register. Patches lie row by row in a `grid` of
    (rows, columns).
    """

    grid: tuple[int, int]
    has_cls: bool
    registers: int
    width: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def first_patch(self) -> int:
        return int(self.has_cls) + self.registers

    @property
    def num_tokens(self) -> int:
        return self.first_patch + self.num_patches


def image_tokens(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return the last hidden state of normalised pixels (B, 3, H, W): tokens (B, N, width)."""
    return _as_tokens(_last_hidden(backbone, pixels))


def token_layout(backbone: nn.Module, size: tuple[int, int]) -> TokenLayout:
    """Return the layout of the tokens of (height, width) images, read off a run of the backbone.

    Parameters that the tokens do not depend on lose their gradient. Raises InputError where the
    backbone can't read that size or its output is no grid of patches after a few other tokens.
    """
    _check_size(backbone, size)
    training = backbone.training
    backbone.eval()
    try:
        with torch.enable_grad():
            output = _last_hidden(backbone, torch.zeros(1, 3, *size))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"--img_res {describe(size)} does not suit this image encoder ({first_line(error)})"
        ) from None
    backbone.train(training)
    freeze_unreached(backbone, output)
    hidden = _as_tokens(output)
    grid = tuple(output.shape[2:]) if output.ndim == 4 else patch_grid(backbone, size)
    has_cls = any(name.split(".")[-1] in CLS_NAMES for name, _ in backbone.named_parameters())
    registers = hidden.shape[1] - grid[0] * grid[1] - int(has_cls)
    if registers < 0:
        raise InputError(
            f"--vit_type: {hidden.shape[1]} tokens of {type(backbone).__name__} are no grid of "
            f"{grid[0]} x {grid[1]} patches; this image encoder is not supported"
        )
    return TokenLayout(grid, has_cls, registers, hidden.shape[2])


def _check_size(backbone: nn.Module, size: tuple[int, int]) -> None:
    """Raise InputError where an image of this size, or one head's attention to it, can't fit."""
    patch = getattr(backbone.config, "patch_size", None)
    pixels = 12.0 * size[0] * size[1]
    patches = size[0] * size[1] / patch**2 if isinstance(patch, int) and patch > 0 else 0
    if hasattr(backbone.config, "depths"):
        patches = 0  # attends within windows
    asked = {f"--img_res {describe(size)}": pixels + 4.0 * patches**2}
    check_fits(asked, "one image in the image encoder")


def patch_grid(backbone: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of the patches of (height, width) images.

    A ViT drops pixels that fill no patch; Swin pads, and merges 2 x 2 patches between stages.
    """
    if hasattr(backbone, "patch_grid"):
        return backbone.patch_grid(size)
    config = backbone.config
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise InputError(
            f"--vit_type: {type(backbone).__name__} tells no patch size, and its output is no map; "
            "this image encoder is not supported"
        )
    sides = zip(size, patch if isinstance(patch, (tuple, list)) else (patch, patch), strict=True)
    if not hasattr(config, "depths"):
        rows, columns = (side // patch for side, patch in sides)
        return rows, columns
    rows, columns = (math.ceil(side / patch) for side, patch in sides)
    for _ in config.depths[1:]:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    return rows, columns


def pretrained_size(backbone: nn.Module) -> tuple[int, int] | None:
    """Return the (height, width) that the position embeddings were learnt for, where it is told."""
    side = getattr(backbone.config, "image_size", None)
    if side is None:
        return None
    return tuple(side) if isinstance(side, (tuple, list)) else (side, side)


def describe(size: tuple[int, int]) -> str:
    """Return the size as the flag is written: 224, or 224x336 (height x width)."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _last_hidden(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return the last hidden state as the backbone gives it: tokens, or a map (B, width, h, w)."""
    if backbone.config.model_type == NAFLEX:
        return _of_cut_patches(backbone, pixels)
    return with_positions(backbone, pixels).last_hidden_state


def with_positions(backbone: nn.Module, pixels: Tensor, **asked: bool) -> Any:
    """Return the backbone's output for pixels of any size, with what else is `asked` of it."""
    return backbone(pixels, **_interpolation(backbone, pixels), **asked)


def _as_tokens(hidden: Tensor) -> Tensor:
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden  # (B, L, width)


def _interpolation(backbone: nn.Module, pixels: Tensor) -> dict[str, bool]:
    """Return the keyword that lets position embeddings follow the resolution, where one is needed.

    BEiT needs none: its relative positions follow by themselves, and with the keyword
    transformers interpolates them a second time.
    """
    known = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
    if not known or backbone.config.model_type == "beit":
        return {}
    resized = tuple(pixels.shape[-2:]) != pretrained_size(backbone)
    return {"interpolate_pos_encoding": True} if resized else {}


def _of_cut_patches(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return the tokens of a NaFlex SigLIP 2: patches are cut here, channels last, row by row."""
    patch = backbone.config.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    cut = unfold(pixels[:, :, : rows * patch, : columns * patch], patch, stride=patch)
    cut = cut.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)  # (B, L, patch² · 3)
    shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), -1)
    mask = torch.ones(cut.shape[:2], dtype=torch.long, device=pixels.device)
    return backbone(cut, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
