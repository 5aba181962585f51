"""What a scene of the embedded data set is made of, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lib.data.scenes.clutter import CANVAS, SUBPIXEL_BITS, draw_clutter

RGB = {
    "red": (222, 26, 32),
    "green": (24, 150, 48),
    "blue": (36, 70, 226),
    "yellow": (250, 224, 30),
    "purple": (132, 36, 176),
    "orange": (248, 128, 12),
    "pink": (252, 142, 200),
    "cyan": (24, 206, 226),
}
DIAMETERS = {"small": (11, 12), "big": (15, 18)}  # pixels of a 96-pixel image, ends included
CELL = CANVAS // 3
OUTLINE = 0.5  # half the width of the dark line around a thing, in pixels


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: its facts, and where exactly it lies in its grid cell."""

    shape: str
    colour: str
    size: str
    row: int  # 0 top, 1 middle, 2 bottom
    column: int  # 0 left, 1 middle, 2 right
    spread: float  # 0 to 1: how large it is among those of its size
    offset: tuple[float, float]  # (x, y) from the cell's centre, in units of a 96-pixel image

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column)."""
        return self.row, self.column

    @property
    def place(self) -> str:
        """The key of `PLACES`."""
        return f"{self.row} {self.column}"


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: the clutter under it and the things, the rearmost first."""

    clutter: int  # the seed of what no caption names, see clutter.py
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Change:
    """What tells a scene from its sibling: a kind of fact, and the things it concerns."""

    kind: str
    things: tuple[int, ...]


def _outlines() -> dict[str, list[np.ndarray]]:
    """Return each shape's closed curves, (N, 2) points (x, y) that span -1 to 1, y downward."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    circle = np.stack([np.sin(angle), -np.cos(angle)], 1)
    ten = np.arange(10) * np.pi / 5
    star = np.stack([np.sin(ten), -np.cos(ten)], 1) * np.where(np.arange(10) % 2, 0.45, 1)[:, None]
    heart = np.stack(
        [
            16 * np.sin(angle) ** 3,
            -13 * np.cos(angle) + 5 * np.cos(2 * angle) + 2 * np.cos(3 * angle) + np.cos(4 * angle),
        ],
        1,
    )
    arm = 0.36
    cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    cross += [(-x, -y) for x, y in cross]
    shapes = {
        "circle": [circle],
        "square": [np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])],
        "triangle": [np.array([(0, -1), (1, 1), (-1, 1)])],
        "star": [_spanning(star)],
        "cross": [np.array(cross)],
        "ring": [circle, 0.4 * circle],
        "heart": [_spanning(heart)],
    }
    return {name: [np.asarray(curve, float) for curve in curves] for name, curves in shapes.items()}


def _spanning(curve: np.ndarray) -> np.ndarray:
    low, high = curve.min(0), curve.max(0)
    return 2 * (curve - low) / (high - low) - 1


OUTLINES = _outlines()


def _curves(thing: Thing, image_size: int) -> list[np.ndarray]:
    """Return the thing's outline in pixels; it lies inside the image."""
    low, high = DIAMETERS[thing.size]
    radius = (low + thing.spread * (high - low)) / 2
    cell = np.array([thing.column, thing.row])
    centre = CELL * (cell + 0.5) + np.array(thing.offset)
    centre = np.clip(centre, radius + 1, CANVAS - radius - 1)
    return [(centre + radius * curve) * image_size / CANVAS for curve in OUTLINES[thing.shape]]


def _points(thing: Thing, image_size: int) -> list[np.ndarray]:
    """Return the outline as OpenCV takes it: integers, a pixel's centre at whole coordinates."""
    scale = 1 << SUBPIXEL_BITS
    curves = _curves(thing, image_size)
    return [np.round((curve - 0.5) * scale).astype(np.int32) for curve in curves]


def draw_scene(scene: Scene, image_size: int) -> np.ndarray:
    """Return the picture as (image_size, image_size, 3) uint8, RGB."""
    image = draw_clutter(scene.clutter, image_size)
    for thing in scene.things:
        points, colour = _points(thing, image_size), RGB[thing.colour]
        darker = tuple(channel // 2 for channel in colour)  # parts things of one colour
        cv2.fillPoly(image, points, colour, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.polylines(image, points, True, darker, 1, cv2.LINE_AA, SUBPIXEL_BITS)
    return image


def visible_shares(scene: Scene) -> list[float]:
    """Return, for each thing, the share of its area that no thing in front of it hides, 0 to 1."""
    hidden = np.zeros((CANVAS, CANVAS), np.uint8)
    shares: list[float] = []
    for thing in reversed(scene.things):
        area = np.zeros_like(hidden)
        cv2.fillPoly(area, _points(thing, CANVAS), 1, cv2.LINE_8, SUBPIXEL_BITS)
        shares.append(1 - np.count_nonzero(area & hidden) / np.count_nonzero(area))
        hidden |= area
    return shares[::-1]


def thing_box(thing: Thing, image_size: int) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 in pixels around the whole thing, hidden parts too; ends excluded."""
    points = np.concatenate(_curves(thing, image_size))
    low = np.floor(points.min(0) - OUTLINE).astype(int).tolist()
    high = np.ceil(points.max(0) + OUTLINE).astype(int).tolist()
    return *low, *high


def boxed_share(scene: Scene, image_size: int = CANVAS) -> float:
    """Return the share of the picture that the things' boxes take up, 0 to 1."""
    covered = np.zeros((image_size, image_size), bool)
    for thing in scene.things:
        x0, y0, x1, y1 = thing_box(thing, image_size)
        covered[y0:y1, x0:x1] = True
    return float(covered.mean())
