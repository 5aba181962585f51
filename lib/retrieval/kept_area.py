"""How much of what matters in an image, as what a caption names, lies in the patches kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from lib.methods.base import Method
from lib.retrieval.evaluation import SplitLoaders

IMAGES_AT_ONCE = 32


@torch.inference_mode()
def area_kept(
    model: Method,
    loaders: SplitLoaders,
    coverages: Mapping[str, np.ndarray],
    device: torch.device,
    autocast: Callable,
) -> dict[str, dict[str, float]]:
    """Return the mean shares, 0 to 1, of what matters to each caption that its kept patches hold.

    A coverage (N_captions, L) is the share of it in each patch, as of the area that a caption names
    ("named_area"), or of attention. "random" is what as many patches drawn at random hold on
    average, "best" what the best choice of as many would: controls below and above. Nothing where
    the method keeps all patches.
    """
    kept: dict[str, list[float]] = {name: [] for name in coverages}
    best: dict[str, list[float]] = {name: [] for name in coverages}
    share: list[float] = []
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
            return {}
        own = choice.kept["sparse"][
            loaders.caption_images[captions] - rows.start, np.arange(len(captions))
        ]
        chosen = own.cpu().numpy()  # (captions, L)
        counts = chosen.sum(1)
        share += (counts / chosen.shape[1]).tolist()
        for name, coverage in coverages.items():
            held = coverage[captions]
            kept[name] += (chosen * held).sum(1).tolist()
            ranked = np.sort(held, axis=1)[:, ::-1].cumsum(1)
            best[name] += ranked[np.arange(len(captions)), counts - 1].tolist()
    at_random = float(np.mean(share))
    return {
        name: {
            "kept": float(np.mean(kept[name])),
            "random": at_random,
            "best": float(np.mean(best[name])),
        }
        for name in coverages
    }
