"""Image files -> uint8 pixels: decoding, resizing and random crops, all before any float."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.batch import image_size

CROP_SCALE = (0.6, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
LOG_RATIO = tuple(np.log(CROP_RATIO).tolist())


def decode(path: str) -> np.ndarray | None:
    """Return the image as OpenCV decodes it, or None where it can't or the JPEG file is cut off."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError:
        return None
    return decode_bytes(data.tobytes())


def decode_bytes(raw: bytes) -> np.ndarray | None:
    """Return the image in a file's bytes, as `decode` does."""
    # OpenCV greys out what a cut-off JPEG lacks; a whole one ends its last scan with FF D9
    unsure = raw.startswith(b"\xff\xd8") and not raw.endswith(b"\xff\xd9")
    if unsure and raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda"):
        return None
    try:
        return cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None


def random_crop_and_flip(
    pixels: Tensor,
    img_res: int | tuple[int, int],
    rng: np.random.Generator,
    full_size: tuple[int, int] | None = None,
    resample: str = "bicubic",
) -> Tensor:
    """Return a random crop of (3, H, W) pixels at (3, *img_res), mirrored half the time.

    The crop is RandomResizedCrop's (Szegedy et al. 2015, as torchvision draws it): area uniform in
    0.6-1.0 of the image, log of the aspect ratio uniform in 3/4-4/3. Of an image that was shrunk,
    `full_size` is the (height, width) before: the box is drawn there, with the same numbers.
    """
    size = pixels.shape[-2:]
    full_height, full_width = full_size or size
    top, left, height, width = crop_box(full_height, full_width, rng)
    rows = _rescaled(top, height, size[0], full_height)
    columns = _rescaled(left, width, size[1], full_width)
    crop = resize(pixels[:, rows, columns], *image_size(img_res), resample)
    return crop.flip(-1) if rng.random() < 0.5 else crop


def _rescaled(start: int, length: int, size: int, full_size: int) -> slice:
    """Return where `length` pixels of `full_size` lie among `size`, to the nearest; never empty."""
    stop = max(1, round((start + length) * size / full_size))
    return slice(min(stop - 1, round(start * size / full_size)), stop)


def crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a crop drawn as RandomResizedCrop does."""
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_SCALE)
        ratio = np.exp(rng.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # No box fits a very long image: the largest one of an allowed ratio, from the middle.
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def shrink(pixels: np.ndarray, img_res: int | tuple[int, int]) -> np.ndarray:
    """Return (H, W, 3) pixels, smaller where no crop that can be drawn comes below img_res then."""
    img_res = max(image_size(img_res))
    height, width = pixels.shape[:2]
    smallest = math.sqrt(height * width * CROP_SCALE[0] * CROP_RATIO[0])  # side of a drawn box
    factor = img_res / min(smallest, height, width)  # a very long image is cropped at its full side
    if factor >= 1:
        return pixels
    full = torch.from_numpy(pixels).permute(2, 0, 1)
    shrunk = resize(full, math.ceil(height * factor), math.ceil(width * factor))
    return np.ascontiguousarray(shrunk.permute(1, 2, 0).numpy())


def resize(pixels: Tensor, height: int, width: int, resample: str = "bicubic") -> Tensor:
    """Return (3, H, W) uint8 pixels at (3, height, width), antialiased, as PIL does it.

    `resample` is the filter, "bicubic" or "bilinear".
    """
    # PyTorch is fastest on interleaved pixels that lie together, flips and batches on planes
    batch = pixels[None].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(batch, size=(height, width), mode=resample, antialias=True)
    return resized[0].contiguous()
