"""Pictures of which patches a model keeps for a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import cv2
import numpy as np
import torch

from lib.batch import Batch
from lib.methods.base import Method
from lib.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from lib.retrieval.evaluation import SplitLoaders

DIMMED = 0.22  # brightness left to a dropped patch
MARGIN = 8
LINE_HEIGHT = 15
PICTURED_PAIRS = 4


def rgb_image(pixels: torch.Tensor) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB of one image's pixels (3, H, W), uint8 or ImageNet-normalised."""
    if pixels.dtype != torch.uint8:
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        pixels = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def kept_overlay(
    image: np.ndarray, kept: np.ndarray, grid: tuple[int, int], side: int = 224
) -> np.ndarray:
    """Return the image, `side` pixels high, with every dropped patch dimmed.

    image (H, W, 3) uint8; kept (L,) bool over a grid of (rows, columns) patches, row by row. Raises
    ValueError where L is another number.
    """
    if len(kept) != grid[0] * grid[1]:
        raise ValueError(f"{len(kept)} patches do not form a grid of {grid[0]} x {grid[1]}")
    size = round(side * image.shape[1] / image.shape[0]), side  # OpenCV's order: width first
    large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    coarse = kept.reshape(grid).astype(np.uint8)
    mask = cv2.resize(coarse, size, interpolation=cv2.INTER_NEAREST)[:, :, None]
    grey = np.repeat(large.mean(axis=2, keepdims=True), 3, axis=2)
    return np.where(mask == 1, large, DIMMED * grey).astype(np.uint8)


def with_caption(image: np.ndarray, caption: str, lines: int = 3) -> np.ndarray:
    """Return the image above its caption, wrapped to the image's width, on white."""
    height, width = image.shape[:2]
    canvas = np.full((height + lines * LINE_HEIGHT + 4, width, 3), 255, np.uint8)
    canvas[:height] = image
    wrapped = textwrap.wrap(caption, max(8, width // 7))
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + " ..."]
    for row, text in enumerate(wrapped):
        place = (2, height + (row + 1) * LINE_HEIGHT - 3)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(canvas, text, place, font, 0.4, (30, 30, 30), 1, cv2.LINE_AA)
    return canvas


def beside(pictures: list[np.ndarray]) -> np.ndarray:
    """Return pictures of one height side by side on white, with margins."""
    height = pictures[0].shape[0]
    gap = np.full((height, MARGIN, 3), 255, np.uint8)
    row = [gap]
    for picture in pictures:
        row += [picture, gap]
    return np.concatenate(row, axis=1)


class KeptPatchStrip:
    """Draws, for a few fixed pairs, each image with the patches kept for its caption.

    `images` and `captions` are evaluation batches whose row i belong together.
    """

    def __init__(
        self, images: Batch, captions: Batch, texts: list[str], device: torch.device
    ) -> None:
        self.images = images.to(device)
        self.captions = captions.to(device)
        self.texts = texts

    @torch.inference_mode()
    def __call__(self, model: Method) -> np.ndarray | None:
        """Return the strip (H, W, 3), or None where the method keeps all patches."""
        training = model.training
        model.eval()
        tokens = model.encode_image_batch(self.images)
        choice = model.patch_choice(tokens, model.encode_text_batch(self.captions))
        model.train(training)
        if choice is None:
            return None
        rows = choice.kept["sparse"].diagonal(dim1=0, dim2=1).T.cpu().numpy()  # (pairs, L)
        pictures = [
            with_caption(kept_overlay(rgb_image(pixels), row, model.image_encoder.grid), text)
            for pixels, row, text in zip(self.images.pixels, rows, self.texts, strict=True)
        ]
        return beside(pictures)


def first_pairs_strip(
    loaders: SplitLoaders, captions: Sequence[str], device: torch.device
) -> KeptPatchStrip:
    """Return what draws the first images of a split, each with its first caption.

    `captions` are the split's texts in order.
    """
    rows = range(min(PICTURED_PAIRS, loaders.num_images))
    chosen = [int(np.flatnonzero(loaders.caption_images == row)[0]) for row in rows]
    texts = [captions[index] for index in chosen]
    return KeptPatchStrip(loaders.images.first(rows), loaders.captions.first(chosen), texts, device)
