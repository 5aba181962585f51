"""Evaluate a model on a split: encode, score, rank; results by the field's names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from lib.batch import Batch
from lib.distributed import broadcast_value, gather_values, on_main, together
from lib.errors import NonFiniteError
from lib.methods.base import Method
from lib.retrieval.bootstrap import rank_intervals
from lib.retrieval.metrics import RECALL_AT, QueryRanks, query_ranks
from lib.retrieval.progress import progress_bar
from lib.retrieval.protocol import protocol_of
from lib.retrieval.shards import RowStore
from lib.retrieval.similarity import (
    encode_batches,
    encoded,
    gathered_texts,
    shard,
    similarity_matrix,
)

COCO_FOLDS = 5
PUBLISHED_NAMES = {("f30k", 1000): "f30k_1k", ("coco", 5000): "coco_5k"}


class Batches(Protocol):
    """One side of a split, read in batches; lib.data.loaders has what does it."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""

    def first(self, indices: Sequence[int]) -> Batch:
        """Return one batch of the items that `indices` name."""

    def after(self, count: int) -> Batches:
        """Return the items but for the first `count`."""

    def only(self, indices: Sequence[int]) -> Batches:
        """Return the items of the whole split that `indices` name."""


@dataclass
class SplitLoaders:
    """A split made ready: this rank's images and captions in batches, and who belongs to whom."""

    images: Batches
    captions: Batches
    caption_images: np.ndarray  # (N_captions,) row of each caption's image, all ranks
    num_images: int
    name: str = "split"
    repeated_share: float = 0.0  # of images whose dense text repeats one of their captions


class Carried:
    """Watches batches on their way to the encoders: did any carry a dense text?"""

    def __init__(self) -> None:
        self.images = self.captions = False

    def watch(self, side: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of a side, "images" or "captions", and note what they carry."""
        for batch in batches:
            if batch.dense_ids is not None:
                setattr(self, side, True)
            yield batch

    def anywhere(self) -> tuple[bool, bool]:
        """Return (images, captions) over all processes."""
        everywhere = gather_values((self.images, self.captions))
        return any(one[0] for one in everywhere), any(one[1] for one in everywhere)


@dataclass(frozen=True)
class SplitScores:
    """The similarity of a whole split, and what its batches carried."""

    matrix: np.ndarray | None  # (N_images, N_captions) float32 on rank 0, None elsewhere
    carried: tuple[bool, bool]  # a dense text beside images; beside captions, of their answer


def split_similarity(
    model: Method,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
    show_progress: bool = True,
) -> np.ndarray | None:
    """Return the split's whole similarity matrix, (N_images, N_captions), on rank 0 alone."""
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
    carried = Carried()
    done = store.finished() if store is not None else []
    finished = sum(map(len, done))
    captions = len(loaders.caption_images)
    with progress_bar("captions", captions, shown=show_progress) as bar, together():
        texts = encode_batches(
            model.encode_text_batch,
            carried.watch("captions", loaders.captions),
            device,
            autocast,
            bar.update,
        )
    everyones = gathered_texts(texts, device)
    batches = loaders.images.after(finished) if finished else loaders.images
    images = encoded(model.encode_image_batch, carried.watch("images", batches), device, autocast)
    pairs = loaders.num_images * captions
    with progress_bar("pairs", pairs, finished * captions, show_progress) as bar:
        keep = None if store is None else store.add
        mine = len(shard(loaders.num_images))
        matrix = similarity_matrix(
            model, images, everyones, autocast, mine, bar.update, device, done, keep
        )
    model.train(training)
    return SplitScores(matrix, carried.anywhere())


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
    """Return the whole split's entry of a results.json (not the mean over folds), None without.

    Of several, as where the test split has changed, the newest.
    """
    if split != "test":
        return results.get(f"{dataset}_{split}")
    names = [PUBLISHED_NAMES[key] for key in PUBLISHED_NAMES if key[0] == dataset] + [dataset]
    names += [name for name in results if re.fullmatch(re.escape(dataset) + r"_\d+", name)]
    found = [results[name] for name in names if name in results]
    return max(found, key=lambda one: str(one.get("date", "")), default=None)


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
    results = broadcast_value(
        on_main(lambda: split_results(scores.matrix, loaders.caption_images, intervals=False))
    )
    return {
        **results,
        "protocol": protocol_of(*scores.carried, loaders.repeated_share),
        "seconds": time.perf_counter() - started,
    }
