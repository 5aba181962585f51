"""Samples -> batches: order, padding, worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset

from lib.batch import Batch
from lib.data.sources import (
    EvalCaptions,
    EvalImages,
    Sample,
    Tokenizer,
    TrainSet,
    seeded_generator,
)
from lib.data.workers import begin_worker, placed, watched
from lib.errors import InputError

ORDER_STREAM = 0  # keeps the draws of the order apart from those of the samples


class PairSampler(BatchSampler):
    """Batches of (epoch, index) keys: each epoch its own permutation of the training pairs.

    Step s of an epoch takes the same `batch_size * world` pairs whatever their share: rank r gets
    the r-th slice of them. The last, incomplete global batch is left out. The epoch travels with
    the index because persistent workers keep the data set they started with.
    Where `siblings` names for each pair another that is much like it (-1: none), a `sibling_share`
    of the pairs is followed by its sibling, so that a batch asks what tells the two apart.
    Raises InputError where not one batch can be filled.
    """

    def __init__(
        self,
        num_pairs: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        siblings: np.ndarray | None = None,
        sibling_share: float = 0.0,
    ) -> None:
        if num_pairs < batch_size * world:
            raise InputError(
                f"--batch_size {batch_size} on {world} process(es) is more than the {num_pairs} "
                "captions of the training split; make it smaller"
            )
        self.num_pairs = num_pairs
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.siblings = siblings if sibling_share > 0 else None
        self.sibling_share = sibling_share
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch that the next iteration runs, from its step `start_step` on."""
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Steps in a whole epoch, wherever it starts."""
        return self.num_pairs // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = seeded_generator(ORDER_STREAM, self.seed, self.epoch)
        order = rng.permutation(self.num_pairs)
        if self.siblings is not None:
            order = _beside_siblings(order, self.siblings, self.sibling_share, rng)
        for step in range(self.start_step, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[first : first + self.batch_size]]


def _beside_siblings(
    order: np.ndarray, siblings: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the same pairs, about a `share` of them right after or before their sibling."""
    leads = rng.random(len(order)) < share  # of two siblings the first to come decides
    taken = np.zeros(len(order), bool)
    together = []
    for index in order.tolist():
        if taken[index]:
            continue
        group = [index]
        sibling = int(siblings[index])
        if leads[index] and sibling >= 0 and not taken[sibling]:
            group.append(sibling)
        taken[group] = True
        together += group
    return np.array(together)


class Collate:
    """Samples -> (Batch, paths of the undecodable images whose pairs were left out).

    The batch is None where no sample is left.
    """

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Sample]) -> tuple[Batch | None, list[str]]:
        bad_paths = [one.bad_path for one in samples if one.bad_path is not None]
        good = [one for one in samples if one.bad_path is None]
        if not good:
            return None, bad_paths
        ids, lengths = self._pad([one.ids for one in good])
        dense_ids, dense_lengths = self._pad([one.dense_ids for one in good])
        pixels: list[Any] = [one.pixels for one in good]  # all have them, or none
        regions = good[0].pixel_length is not None
        batch = Batch(
            pixels=None if pixels[0] is None else torch.stack(pixels),
            pixel_lengths=torch.tensor([one.pixel_length for one in good]) if regions else None,
            ids=ids,
            lengths=lengths,
            image_ids=torch.tensor([one.row for one in good]),
            caption_index=None if ids is None else torch.tensor([one.caption for one in good]),
            dense_ids=dense_ids,
            dense_lengths=dense_lengths,
        )
        return placed(batch), bad_paths

    def _pad(self, rows: list[list[int] | None]) -> tuple[Tensor | None, Tensor | None]:
        if rows[0] is None:
            return None, None
        tensors = [torch.tensor(row) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=self.pad_id)  # (B, M)
        return ids, torch.tensor([len(row) for row in rows])


class TrainLoader:
    """Training batches, epoch by epoch, over workers that stay."""

    def __init__(self, loader: DataLoader, sampler: PairSampler) -> None:
        self._loader = loader
        self._sampler = sampler

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        return len(self._sampler)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch | None, list[str]]]:
        """Return (Batch, bad paths) for each step of the epoch from `start_step` on.

        Pairs whose image can't be decoded are left out and their paths named; the batch is None
        where no pair is left. Raises WorkerError where a worker ends or can't deliver.
        """
        self._sampler.set_epoch(epoch, start_step)
        return watched(self._loader)


class EvalLoader:
    """Yields Batch after Batch in order; raises InputError for an image that can't be decoded."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def first(self, indices: Sequence[int]) -> Batch:
        """Return one batch of the items that `indices` name, read in this process."""
        dataset = self._loader.dataset
        batch, bad_paths = self._loader.collate_fn([dataset[index] for index in indices])
        _refuse(bad_paths)
        return batch

    def after(self, count: int) -> EvalLoader:
        """Return the loader of the same items but for the first `count`."""
        return self.only(list(self._loader.sampler)[count:])

    def only(self, indices: Sequence[int]) -> EvalLoader:
        """Return the loader of the items that `indices` name, of the whole split, in batches."""
        old, dataset = self._loader, cast("EvalImages | EvalCaptions", self._loader.dataset)
        rest = make_loader(
            dataset,
            dataset.tokenizer,
            old.num_workers,
            old.pin_memory,
            batch_size=old.batch_size,
            sampler=indices,
        )
        return EvalLoader(rest)

    def tolerant(self) -> Iterator[tuple[Batch | None, list[str]]]:
        """Yield (Batch, paths of the images that can't be decoded); None where no image is left."""
        yield from watched(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch, bad_paths in watched(self._loader):
            _refuse(bad_paths)  # here, as a worker would wrap the sentence in a traceback
            yield batch


def _refuse(bad_paths: Sequence[str]) -> None:
    if bad_paths:
        raise InputError(f"{bad_paths[0]} can't be decoded; replace the image file")


def train_loader(
    dataset: TrainSet,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
    siblings: np.ndarray | None = None,
    sibling_share: float = 0.0,
) -> TrainLoader:
    """Return the loader of training batches of `batch_size` pairs per process.

    `siblings` and `sibling_share` as in `PairSampler`.

    Raises InputError where the data set does not fill one batch, or there can be no negatives.
    """
    if batch_size * world < 2:
        raise InputError(
            f"--batch_size {batch_size}: a single pair has no negatives; make it larger"
        )
    if len(np.unique(dataset.caption_image)) < 2:
        raise InputError(
            "all captions of the training split belong to one image alone, so there are no "
            "negatives to learn from; add images"
        )
    sampler = PairSampler(
        len(dataset), batch_size, dataset.seed, rank, world, siblings, sibling_share
    )
    loader = make_loader(dataset, dataset.tokenizer, num_workers, pin_memory, batch_sampler=sampler)
    return TrainLoader(loader, sampler)


def eval_loader(
    dataset: EvalImages | EvalCaptions,
    batch_size: int,
    indices: Sequence[int] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EvalLoader:
    """Return the loader of images or captions in order; `indices` are this rank's of them."""
    order = {"batch_size": batch_size, "sampler": indices}
    return EvalLoader(make_loader(dataset, dataset.tokenizer, num_workers, pin_memory, **order))


def make_loader(
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    workers: int,
    pin_memory: bool,
    collate: Callable[[list], Any] | None = None,
    **order,
) -> DataLoader:
    """Return a loader for `watched`, whatever the kind of data set and `order`.

    Without a `collate` of their own, items are samples and become batches.
    """
    workers = min(workers, os.cpu_count() or 1)
    if workers:
        # OpenCV's thread pool does not survive a fork: a worker that inherits one can hang. Here,
        # in the parent, it is taken down; workers are what decodes in parallel.
        cv2.setNumThreads(1)
    return DataLoader(
        dataset,
        collate_fn=collate or Collate(tokenizer.pad_id if tokenizer else 0),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=begin_worker,
        # a loader without its own generator draws from the model's, and a resumed run would differ
        generator=torch.Generator(),
        **order,
    )
