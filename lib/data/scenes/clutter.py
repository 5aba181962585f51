"""What no caption names: a patchwork ground of several textures, and dull scraps lying on it."""

from __future__ import annotations

import cv2
import numpy as np

CANVAS = 96  # the unit in which scenes are laid out, whatever size they are drawn at
SUBPIXEL_BITS = 4  # OpenCV takes corners as integers; so many of their bits are the fraction
REGIONS = (4, 6)  # of the ground, ends included
SCRAPS = (14, 22)
SCRAP_RADIUS = (2.5, 7.0)  # pixels of a 96-pixel image
DULL = np.array(  # RGB; none is near a colour that captions know
    [
        (128, 128, 128),
        (150, 132, 108),
        (112, 118, 92),
        (96, 108, 124),
        (176, 166, 148),
        (84, 78, 74),
    ]
)
TEXTURES = ("plain", "striped", "dotted", "checkered", "grained")


def draw_clutter(seed: int, image_size: int) -> np.ndarray:
    """Return the ground with its scraps, (image_size, image_size, 3) uint8 RGB."""
    rng = np.random.default_rng(seed)
    image = _ground(rng, image_size)
    for _ in range(int(rng.integers(SCRAPS[0], SCRAPS[1] + 1))):
        _add_scrap(image, rng)
    return image


def _ground(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Return regions around random centres, each with a texture of its own."""
    count = int(rng.integers(REGIONS[0], REGIONS[1] + 1))
    centres = rng.uniform(0, CANVAS, (count, 2))
    textures = rng.permutation(len(TEXTURES) * 2)[:count] % len(TEXTURES)
    line = (np.arange(image_size) + 0.5) * CANVAS / image_size
    x, y = np.meshgrid(line, line)
    nearest = ((x[..., None] - centres[:, 0]) ** 2 + (y[..., None] - centres[:, 1]) ** 2).argmin(-1)
    image = np.empty((image_size, image_size, 3))
    for region, texture in enumerate(textures.tolist()):
        tone = DULL[int(rng.integers(len(DULL)))] + rng.integers(-12, 13)
        marked = _pattern(TEXTURES[texture], x, y, rng)
        here = nearest == region
        image[here] = np.where(marked[here, None], tone - 34, tone + 18)
    return image.clip(0, 255).astype(np.uint8)


def _pattern(texture: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return which pixels a texture darkens, a bool for each of the coordinates."""
    step, phase = float(rng.uniform(4, 9)), rng.uniform(0, 9, 2)
    x, y = x + phase[0], y + phase[1]
    if texture == "plain":
        return np.zeros(x.shape, bool)
    if texture == "striped":
        angle = float(rng.uniform(0, np.pi))
        return (x * np.cos(angle) + y * np.sin(angle)) % step < step / 2
    if texture == "checkered":
        return (x // step + y // step) % 2 == 0
    if texture == "dotted":
        return (x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (step / 3) ** 2
    coarse = rng.random((48, 48)) < 0.35  # grains two pixels of a 96-pixel image wide
    return coarse[(y / 2).astype(int) % 48, (x / 2).astype(int) % 48]


def _add_scrap(image: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a shapeless blob or a bent stroke on the image."""
    scale = image.shape[0] / CANVAS
    centre = rng.uniform(0, CANVAS, 2)
    radius = float(rng.uniform(*SCRAP_RADIUS))
    colour = DULL[int(rng.integers(len(DULL)))] + rng.integers(-45, 46)
    colour = tuple(int(channel) for channel in colour.clip(0, 255))
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    reach = radius * rng.uniform(0.35, 1, 7)[:, None]
    curve = centre + reach * np.stack([np.cos(angles), np.sin(angles)], 1)
    points = [np.round((curve * scale - 0.5) * (1 << SUBPIXEL_BITS)).astype(np.int32)]
    if rng.random() < 0.6:
        cv2.fillPoly(image, points, colour, cv2.LINE_AA, SUBPIXEL_BITS)
    else:
        width = max(1, round(1.6 * scale))
        cv2.polylines(image, [points[0][:4]], False, colour, width, cv2.LINE_AA, SUBPIXEL_BITS)
