"""What is retrieved: the captions and images of a split by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gallery:
    """A split as results tell of it; an image's row is its place in `image_ids`."""

    dataset: str
    split: str
    captions: Sequence[str]
    image_ids: Sequence[str]
    caption_images: np.ndarray  # (N_captions,) row of each caption's image
