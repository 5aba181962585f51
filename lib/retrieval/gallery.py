"""What is retrieved: the captions and images of a split by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.retrieval.protocol import repeated_captions


@dataclass(frozen=True)
class Gallery:
    """A split as results tell of it; an image's row is its place in `image_ids`."""

    dataset: str
    split: str
    captions: Sequence[str]
    image_ids: Sequence[str]
    caption_images: np.ndarray  # (N_captions,) row of each caption's image
    dense: Sequence[str] | None = None  # one an image, where they were read

    def repeated_share(self) -> float:
        """Return the share of images whose dense text repeats one of their captions."""
        if self.dense is None:
            return 0.0
        return repeated_captions(self.dense, self.captions, self.caption_images)
