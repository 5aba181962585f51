"""Sheets of pictures that show an `Evidence`: kept patches, significance and its parts, words.

Every panel is composed in whole pixels and put on the sheet unscaled, so that a patch is drawn
exactly where the encoder saw it: patch (r, c) of R x C fills rows r·H/R to (r+1)·H/R.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lib.errors import InputError
from lib.files import write_bytes_whole
from lib.retrieval.evidence import Evidence

PANEL = 220  # pixels of a panel's longer side, about: a whole number a patch
GAP, TITLE, LINE = 14, 20, 16
DPI = 100
MOST_WORDS = 24
PER_ROW = 6
DIMMED = 0.22  # brightness left to a dropped patch
HEAT = 0.6  # share of the colour in a heat map
BOX = (255, 255, 255)


@dataclass(frozen=True)
class Panel:
    """A picture on a sheet, with its place: x and y of the upper left corner, in pixels."""

    picture: np.ndarray
    title: str
    x: int = 0
    y: int = 0


@dataclass(frozen=True)
class Sheet:
    """Panels and lines of text (x, y of the upper left corner, text, size in points)."""

    width: int
    height: int
    panels: list[Panel]
    texts: list[tuple[int, int, str, int]]

    def render(self) -> np.ndarray:
        """Return the sheet, (height, width, 3) uint8 RGB; InputError without matplotlib."""
        figure_class, canvas_class = require_matplotlib()
        figure = figure_class(figsize=(self.width / DPI, self.height / DPI), dpi=DPI)
        canvas = canvas_class(figure)
        for x, y, text, size in self.texts:
            self._write(figure, x, y, text, size)
        for panel in self.panels:
            self._write(figure, panel.x, panel.y - TITLE + 4, panel.title, 8)
        canvas.draw()
        drawn = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
        for panel in self.panels:
            height, width = panel.picture.shape[:2]
            drawn[panel.y : panel.y + height, panel.x : panel.x + width] = panel.picture
        return drawn

    def _write(self, figure: Any, x: int, y: int, text: str, size: int) -> None:
        figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size,
            va="top",
            color="#222222",
            parse_math=False,
        )

    def save(self, path: str | Path) -> None:
        """Write the sheet as a PNG, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.cvtColor(self.render(), cv2.COLOR_RGB2BGR)
        write_bytes_whole(path, cv2.imencode(".png", pixels)[1].tobytes())


def require_matplotlib() -> tuple[Any, Any]:
    """Return matplotlib's Figure and Agg canvas. Raises InputError where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"no picture without matplotlib ({error}): python -m pip install matplotlib"
        ) from None
    return Figure, FigureCanvasAgg


# --- panels ------------------------------------------------------------------------------------


def panel_size(image: np.ndarray, grid: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a panel near the image's shape, whole pixels a patch."""
    height, width = image.shape[:2]
    scale = PANEL / max(height, width)
    rows, columns = grid
    return (
        rows * max(1, round(height * scale / rows)),
        columns * max(1, round(width * scale / columns)),
    )


def fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the image at (height, width)."""
    larger = size[0] > image.shape[0]
    way = cv2.INTER_CUBIC if larger else cv2.INTER_AREA
    return cv2.resize(image, size[::-1], interpolation=way)


def on_grid(values: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return patch values (L,) spread over their pixels, (height, width)."""
    rows, columns = grid
    table = values.reshape(rows, columns)
    return table.repeat(size[0] // rows, axis=0).repeat(size[1] // columns, axis=1)


def kept_panel(evidence: Evidence, branch: str) -> np.ndarray:
    """Return the image with the patches that a branch drops dimmed and without colour."""
    size = panel_size(evidence.image, evidence.grid)
    image = fitted(evidence.image, size)
    kept = on_grid(evidence.kept[branch], evidence.grid, size)[:, :, None]
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return np.where(kept, image, (DIMMED * grey).astype(np.uint8))


def heat_panel(evidence: Evidence, values: np.ndarray, marked: Sequence[int] = ()) -> np.ndarray:
    """Return the image under a map of patch values (L,), lowest dark; `marked` ones are boxed."""
    size = panel_size(evidence.image, evidence.grid)
    low, high = float(values.min()), float(values.max())
    share = (values - low) / max(high - low, 1e-12)
    heat = on_grid((255 * share).astype(np.uint8), evidence.grid, size)
    colours = cv2.cvtColor(cv2.applyColorMap(heat, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    grey = fitted(evidence.image, size).mean(axis=2, keepdims=True)
    picture = (HEAT * colours + (1 - HEAT) * grey).astype(np.uint8)
    for patch in marked:
        top, left, bottom, right = patch_box(int(patch), evidence.grid, size)
        cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), BOX, 1)
    return picture


def patch_box(
    patch: int, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of a patch in a panel, ends excluded."""
    height, width = size[0] // grid[0], size[1] // grid[1]
    row, column = divmod(patch, grid[1])
    return row * height, column * width, (row + 1) * height, (column + 1) * width


# --- sheets ------------------------------------------------------------------------------------


def pair_sheet(evidence: Evidence) -> Sheet:
    """Return the sheet of one pair: image, kept patches, significance, its parts, words."""
    grid = evidence.grid or (1, 1)
    image = fitted(evidence.image, panel_size(evidence.image, grid))
    choice = [Panel(image, "image")]
    choice += [Panel(kept_panel(evidence, one), f"kept, {one} text") for one in evidence.kept]
    branches = [name for name in evidence.scores if name in evidence.kept]
    parts = [name for name in evidence.scores if name not in evidence.kept]
    maps = [_map_panel(evidence, one, f"significance, {one}") for one in branches]
    maps += [_map_panel(evidence, one, one) for one in parts]
    words = [_word_panel(evidence, word) for word in range(min(MOST_WORDS, len(evidence.words)))]
    hidden = len(evidence.words) - len(words)
    head = [f"{evidence.method}, similarity {evidence.similarity:.3f}"]
    head += [one for one in [evidence.note] if one]
    if hidden:
        head.append(f"the first {MOST_WORDS} words; {hidden} more are not shown")
    return lay_out(evidence.caption, head, [choice, maps, words])


def _map_panel(evidence: Evidence, name: str, title: str) -> Panel:
    values = evidence.scores[name]
    told = f"{title}: {values.min():.2f} to {values.max():.2f}"
    return Panel(heat_panel(evidence, values), told)


def _word_panel(evidence: Evidence, word: int) -> Panel:
    best = evidence.best(word)
    values = " ".join(f"{evidence.cosines[word, one]:.2f}" for one in best)
    panel = heat_panel(evidence, evidence.cosines[word], best)
    return Panel(panel, f"“{evidence.words[word]}”  {values}")


def captions_sheet(evidences: Sequence[Evidence]) -> Sheet:
    """Return one image with all its captions: for each, what it keeps and where it looks."""
    first = evidences[0]
    image = fitted(first.image, panel_size(first.image, first.grid or (1, 1)))
    rows = []
    for one in evidences:
        row = [Panel(kept_panel(one, name), f"kept, {name} text") for name in one.kept]
        row += [_map_panel(one, name, f"significance, {name}") for name in one.kept]
        if not row and one.cosines is not None:
            row = [Panel(heat_panel(one, one.cosines.max(0)), "best word of each patch")]
        rows.append(row or [Panel(image, first.method)])
    head = [f"{first.method}: one image, its captions, their similarities"]
    head += [one for one in [first.note] if one]
    return _columns_sheet(image, evidences, rows, head)


def _columns_sheet(
    image: np.ndarray, evidences: Sequence[Evidence], rows: list[list[Panel]], head: list[str]
) -> Sheet:
    height, width = image.shape[:2]
    letters = max(16, width // 6)
    labels = [textwrap.wrap(f"{one.caption} ({one.similarity:.3f})", letters) for one in evidences]
    label_lines = max(map(len, labels))
    texts = [(GAP, GAP + LINE * line, text, 9) for line, text in enumerate(head)]
    top = GAP + LINE * len(head) + GAP
    first_row = top + LINE * label_lines + TITLE
    panels = [Panel(image, "image", GAP, first_row)]
    for column, (row, lines) in enumerate(zip(rows, labels, strict=True), start=1):
        x = GAP + column * (width + GAP)
        texts += [(x, top + LINE * n, text, 8) for n, text in enumerate(lines)]
        for n, panel in enumerate(row):
            y = first_row + n * (height + TITLE + 4)
            panels.append(Panel(panel.picture, panel.title, x, y))
    total_width = 2 * GAP + (len(rows) + 1) * (width + GAP)
    total_height = first_row + max(map(len, rows)) * (height + TITLE + 4) + GAP
    return Sheet(total_width, total_height, panels, texts)


def lay_out(title: str, head: Sequence[str], groups: Sequence[Sequence[Panel]]) -> Sheet:
    """Return groups of panels under each other, each begun in a new line, at most six a line."""
    shown = [group for group in groups if group]
    height, width = shown[0][0].picture.shape[:2]
    across = min(PER_ROW, max(len(group) for group in shown))
    across = max(across, 2)
    total = GAP + across * (width + GAP)
    lines = textwrap.wrap(title, max(20, total // 8)) or [""]
    texts = [(GAP, GAP + 18 * n, line, 10) for n, line in enumerate(lines)]
    y = GAP + 18 * len(lines) + 4
    wrapped = [part for one in head for part in textwrap.wrap(one, max(20, total // 7))]
    texts += [(GAP, y + LINE * n, line, 9) for n, line in enumerate(wrapped)]
    y += LINE * len(wrapped)
    panels = []
    for group in shown:
        for start in range(0, len(group), across):
            y += TITLE + 6
            for column, panel in enumerate(group[start : start + across]):
                x = GAP + column * (width + GAP)
                panels.append(Panel(panel.picture, panel.title, x, y))
            y += height
        y += 4
    return Sheet(total, y + GAP, panels, texts)
