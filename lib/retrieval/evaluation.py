"""Evaluate a model on a split: encode, score, rank; results by the field's names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lib.batch import Batch
from lib.distributed import gather_values, is_main
from lib.errors import NonFiniteError
from lib.methods.base import Method
from lib.retrieval.bootstrap import rank_intervals
from lib.retrieval.metrics import RECALL_AT, QueryRanks, query_ranks
from lib.retrieval.protocol import protocol_of
from lib.retrieval.shards import RowStore
from lib.retrieval.similarity import encode_batches, encoded, gather_texts, similarity_matrix

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


@dataclass(frozen=True)
class SplitScores:
    """The similarity of a whole split, and what its batches carried."""

    matrix: np.ndarray  # (N_images, N_captions) float32
    images_carried: bool  # a dense text beside the image
    captions_carried: bool  # a dense text, that of its own answer, beside the caption

    @property
    def protocol(self) -> str:
        """Return the protocol by what was carried; texts that repeat captions are not looked at."""
        return protocol_of(self.images_carried, self.captions_carried)


def split_similarity(
    model: Method,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
    show_progress: bool = True,
) -> np.ndarray:
    """Return the split's whole similarity matrix, (N_images, N_captions) float32."""
    return score_split(model, loaders, device, autocast, show_progress).matrix


def score_split(
    model: Method,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
    show_progress: bool = True,
    store: RowStore | None = None,
) -> SplitScores:
    """Return the scores of a split: captions are encoded first, then each batch of images scored.

    Only one batch of images is held at a time. With a `store` the rows that an earlier, killed
    evaluation finished are taken from it, and their images are not read again.
    """
    training = model.training
    model.eval()
    done = store.finished() if store is not None else []
    finished = sum(map(len, done))
    carried = {"images": False, "captions": False}

    def watched(side: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            carried[side] |= batch.dense_ids is not None
            yield batch

    def bar(what: str, total: int, start: int = 0) -> tqdm:
        hidden = not (show_progress and is_main())
        return tqdm(
            total=total,
            initial=start,
            desc=what,
            disable=hidden,
            leave=False,
            ncols=80,
            mininterval=0.5,
            unit_scale=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left",
        )

    captions = len(loaders.caption_images)
    with bar("captions", captions) as shown:
        texts = encode_batches(
            model.encode_text_batch,
            watched("captions", loaders.captions),
            device,
            autocast,
            shown.update,
        )
    texts = gather_texts(texts)
    batches = loaders.images.after(finished) if finished else loaders.images
    images = encoded(model.encode_image_batch, watched("images", batches), device, autocast)
    with bar("pairs", loaders.num_images * captions, finished * captions) as shown:
        keep = None if store is None else store.add
        matrix = similarity_matrix(model, images, texts, autocast, shown.update, done, keep)
    model.train(training)
    everywhere = gather_values(carried)
    return SplitScores(matrix, *(any(one[side] for one in everywhere) for side in carried))


def split_results(
    matrix: np.ndarray,
    caption_images: np.ndarray,
    folds: int = 1,
    intervals: bool = True,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Any]:
    """Return `ranks_table` of a similarity matrix; folds > 1 averages.

    Raises NonFiniteError where the matrix holds NaN or infinity.
    """
    return ranks_table(finite_ranks(matrix, caption_images, folds), recall_at, intervals)


def finite_ranks(matrix: np.ndarray, caption_images: np.ndarray, folds: int = 1) -> QueryRanks:
    """Return the ranks of a similarity matrix; NonFiniteError where it holds NaN or infinity."""
    finite = np.count_nonzero(np.isfinite(matrix))
    if finite < matrix.size:
        raise NonFiniteError(f"{matrix.size - finite} of {matrix.size} similarities are not finite")
    return query_ranks(matrix, caption_images=caption_images, folds=folds)


def ranks_table(
    found: QueryRanks, recall_at: Sequence[int] = RECALL_AT, intervals: bool = True
) -> dict[str, Any]:
    """Return recalls, rSum, ties and, where wanted, 95 % intervals of the ranks."""
    table = found.metrics(recall_at)
    if intervals:
        table["intervals"] = rank_intervals(found, recall_at)
    return table


def split_tables(
    dataset: str, split: str, caption_images: np.ndarray, matrix: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return `ranks_table` of a split by the names of `result_names`."""
    found = split_ranks(dataset, split, caption_images, matrix)
    return {name: ranks_table(one) for name, one in found.items()}


def split_ranks(
    dataset: str, split: str, caption_images: np.ndarray, matrix: np.ndarray
) -> dict[str, QueryRanks]:
    """Return the ranks of a split by the names of `result_names`; NonFiniteError as there."""
    names = result_names(dataset, split, matrix.shape[0])
    return {name: finite_ranks(matrix, caption_images, folds) for name, folds in names.items()}


def result_names(dataset: str, split: str, images: int) -> dict[str, int]:
    """Return the names of a split's results, each with its number of folds.

    The field's names, f30k_1k, coco_1k (five folds) and coco_5k, stand only where the counts are
    those; other test splits are NAME_N, and `scenes` is scenes.
    """
    if split != "test":
        return {f"{dataset}_{split}": 1}
    name = PUBLISHED_NAMES.get((dataset, images), f"{dataset}_{images}")
    folds = {"coco_1k": COCO_FOLDS} if name == "coco_5k" else {}
    return {**folds, "scenes" if dataset == "scenes" else name: 1}


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
    """Return recalls and the protocol of one split, without intervals: what validation needs."""
    started = time.perf_counter()
    scores = score_split(model, loaders, device, autocast, show_progress)
    results = split_results(scores.matrix, loaders.caption_images, intervals=False)
    return {**results, "protocol": scores.protocol, "seconds": time.perf_counter() - started}
