"""How much of what matters in an image, as what a caption names, lies in the patches kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lib.methods.base import Method
from lib.retrieval.evaluation import SplitLoaders

IMAGES_AT_ONCE = 32


@torch.inference_mode()
def area_kept(
    model: Method,
    loaders: SplitLoaders,
    coverage: np.ndarray,
    device: torch.device,
    autocast: Callable,
) -> dict[str, float] | None:
    """Return the mean share, 0 to 1, of what matters to each caption that its kept patches hold.

    coverage (N_captions, L) is the share of it in each patch, as of the area that a caption names,
    or of attention. "random" is what as many patches drawn at random hold on average, "best" what
    the best choice of as many would: controls below and above. None where the method keeps all
    patches.
    """
    kept_area, share, best = [], [], []
    model.eval()
    for first in range(0, loaders.num_images, IMAGES_AT_ONCE):
        rows = range(first, min(first + IMAGES_AT_ONCE, loaders.num_images))
        inside = (loaders.caption_images >= rows.start) & (loaders.caption_images < rows.stop)
        captions = np.flatnonzero(inside)
        with autocast():
            images = model.encode_image_batch(loaders.images.first(rows).to(device))
            texts = model.encode_text_batch(loaders.captions.first(captions.tolist()).to(device))
            choice = model.patch_choice(images, texts)
        if choice is None:
            return None
        own = choice.kept["sparse"][
            loaders.caption_images[captions] - rows.start, np.arange(len(captions))
        ]
        chosen, named = own.cpu().numpy(), coverage[captions]  # (captions, L) both
        counts = chosen.sum(1)
        kept_area += (chosen * named).sum(1).tolist()
        share += (counts / chosen.shape[1]).tolist()
        ranked = np.sort(named, axis=1)[:, ::-1].cumsum(1)
        best += ranked[np.arange(len(captions)), counts - 1].tolist()
    means = (float(np.mean(values)) for values in (kept_area, share, best))
    return dict(zip(("kept", "random", "best"), means, strict=True))
