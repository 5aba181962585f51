"""Evaluate a model on a split: encode, score, rank; and the results file."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lib.batch import Batch
from lib.distributed import is_main
from lib.errors import NonFiniteError
from lib.files import write_text_whole
from lib.methods.base import Method
from lib.retrieval.bootstrap import recall_intervals
from lib.retrieval.metrics import fold_metrics, recall_metrics
from lib.retrieval.similarity import (
    encode_batches,
    gather_texts,
    similarity_matrix,
)

COCO_FOLDS = 5
PUBLISHED_NAMES = {("f30k", 1000): "f30k_1k", ("coco", 5000): "coco_5k"}


@dataclass
class SplitLoaders:
    """A split made ready: this rank's images and captions in batches, and who belongs to whom."""

    images: Iterable[Batch]
    captions: Iterable[Batch]
    caption_images: np.ndarray  # (N_captions,) row of each caption's image, all ranks
    num_images: int
    name: str = "split"


def split_similarity(
    model: Method,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
    show_progress: bool = True,
) -> np.ndarray:
    """Return the split's whole similarity matrix, (N_images, N_captions) float32."""
    training = model.training
    model.eval()

    def bar(what: str, total: int) -> tqdm:
        hidden = not (show_progress and is_main())
        return tqdm(total=total, desc=what, disable=hidden, leave=False, ncols=80, mininterval=0.5)

    pairs = loaders.num_images * len(loaders.caption_images)
    with bar("captions", len(loaders.caption_images)) as shown:
        texts = encode_batches(
            model.encode_text_batch, loaders.captions, device, autocast, shown.update
        )
    texts = gather_texts(texts)
    with bar("images", loaders.num_images) as shown:
        images = encode_batches(
            model.encode_image_batch, loaders.images, device, autocast, shown.update
        )
    with bar("pairs", pairs) as shown:
        shown.unit_scale = True
        matrix = similarity_matrix(model, images, texts, autocast, shown.update)
    model.train(training)
    return matrix


def split_results(
    matrix: np.ndarray, caption_images: np.ndarray, folds: int = 1, intervals: bool = True
) -> dict[str, Any]:
    """Return recalls, rSum, ties and 95 % intervals of a similarity matrix; folds > 1 averages.

    Raises NonFiniteError where the matrix holds NaN or infinity.
    """
    if not np.isfinite(matrix).all():
        count = int((~np.isfinite(matrix)).sum())
        raise NonFiniteError(f"{count} of {matrix.size} similarities are not finite")
    if folds > 1:
        results = fold_metrics(matrix, folds, caption_images=caption_images)
    else:
        results = recall_metrics(matrix, caption_images=caption_images)
    if intervals:
        results["intervals"] = recall_intervals(matrix, caption_images=caption_images, folds=folds)
    return results


def split_tables(
    dataset: str, split: str, caption_images: np.ndarray, matrix: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return recalls of a split, named by data set and number of images.

    The field's names, f30k_1k, coco_1k (five folds) and coco_5k, stand only where the counts are
    those; other test splits are NAME_N, and `scenes` is scenes.
    """
    rows, images = caption_images, matrix.shape[0]
    if split != "test":
        return {f"{dataset}_{split}": split_results(matrix, rows)}
    name = PUBLISHED_NAMES.get((dataset, images), f"{dataset}_{images}")
    tables = {}
    if name == "coco_5k":
        tables["coco_1k"] = split_results(matrix, rows, folds=COCO_FOLDS)
    return {**tables, "scenes" if dataset == "scenes" else name: split_results(matrix, rows)}


def find_table(results: dict[str, Any], dataset: str, split: str) -> dict[str, Any] | None:
    """Return the whole split's entry of a results.json (not the mean over folds), None without."""
    if split != "test":
        return results.get(f"{dataset}_{split}")
    names = [PUBLISHED_NAMES[key] for key in PUBLISHED_NAMES if key[0] == dataset] + [dataset]
    names += [name for name in results if re.fullmatch(re.escape(dataset) + r"_\d+", name)]
    return next((results[name] for name in names if name in results), None)


def evaluate_split(
    model: Method,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Return recalls of one split, without intervals: what validation needs."""
    started = time.perf_counter()
    matrix = split_similarity(model, loaders, device, autocast, show_progress)
    results = split_results(matrix, loaders.caption_images, intervals=False)
    results["seconds"] = time.perf_counter() - started
    return results


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write results as JSON; entries of other splits that are already there stay."""
    path = Path(path)
    known = {}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
    known.update(results)
    write_text_whole(path, json.dumps(known, indent=2) + "\n")
