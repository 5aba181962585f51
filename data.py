"""Files + captions -> Batch: layouts, splits, image transforms, samplers and loaders."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset

from lib.batch import Batch
from lib.errors import InputError
from lib.image_cache import ImageCache, PreparedImage
from lib.images import CROP_RATIO, CROP_SCALE, decode, random_crop_and_flip, resize, shrink
from lib.splits import Regions, map_array
from lib.splits import Split as Split  # offered here to the programs, as are the readers
from lib.splits import load_region_split as load_region_split
from lib.splits import load_split as load_split
from vocab import WordTokenizer

ORDER_STREAM, SAMPLE_STREAM = 0, 1  # keep the draws of the permutation and of the samples apart


# ---------------------------------------------------------------------------------------- images


class ImageFolderSource:
    """Image files read as (3, img_res, img_res) uint8 RGB; row r is `files[r]`.

    A `cache` keeps them resized, and what is read is the same to the bit. To `augment` it keeps
    them shrunk, so far that the smallest crop that can be drawn still has img_res pixels a side:
    the same boxes are drawn to within a rounding, but pixels resampled twice differ, by about 2 of
    255 on average (640x480 at img_res 224). Images that need no shrinking stay the same to the bit.
    """

    def __init__(
        self, files: Sequence[str], img_res: int, augment: bool, cache: ImageCache | None = None
    ) -> None:
        self.files = files
        self.img_res = img_res
        self.augment = augment
        self.cache = cache
        self._settings = f"{img_res} {(CROP_SCALE, CROP_RATIO) if augment else 'whole'}"

    def sample(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return the sample of image `row`, as `read` does; a bad one names its file."""
        pixels = self.read(row, rng)
        return Sample(row, pixels, bad_path=self.files[row] if pixels is None else None)

    def read(self, row: int, rng: np.random.Generator | None = None) -> Tensor | None:
        """Return image `row`, or None where it can't be decoded; `rng` draws the augmentation.

        Everything stays uint8: the model scales and normalises on the device.
        """
        path = self.files[row]
        if self.cache is None:
            image = self._prepare(path)
        else:
            image = self.cache.get(path, self._settings, lambda: self._prepare(path))
        if image is None:
            return None
        pixels = torch.from_numpy(image.pixels)
        if not self.augment:
            return pixels
        pixels = pixels.permute(2, 0, 1)  # (3, H, W)
        return random_crop_and_flip(pixels, self.img_res, rng, image.full_size).flip(0)

    def _prepare(self, path: str) -> PreparedImage | None:
        """Return what does not depend on chance: resized RGB (3, ...), to augment BGR (..., 3)."""
        pixels = decode(path)  # (H, W, 3) BGR
        if pixels is None:
            return None
        full_size = pixels.shape[:2]
        if not self.augment:
            resized = resize(torch.from_numpy(pixels).permute(2, 0, 1), self.img_res, self.img_res)
            pixels = resized.flip(0).numpy()  # RGB, after resizing, where there is less to move
        elif self.cache is not None:
            pixels = shrink(pixels, self.img_res)
        return PreparedImage(pixels, full_size)


class RegionSource:
    """Precomputed regions read as (R, F) float32 and their number; never augmented."""

    def __init__(self, regions: Regions) -> None:
        self.regions = regions
        self._features: np.memmap | None = None

    @property
    def features(self) -> np.memmap:
        """Return the whole file, memory-mapped at the first use: each worker maps it itself."""
        if self._features is None:
            self._features = map_array(self.regions.file)
        return self._features

    def __getstate__(self) -> dict:
        return {**vars(self), "_features": None}  # a map would be pickled with all its numbers

    def sample(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return the sample of image `row`; `rng` goes unread."""
        pixels, length = self.read(row)
        return Sample(row, pixels, pixel_length=length)

    def read(self, row: int) -> tuple[Tensor, int]:
        """Return the regions of image `row`, (R, F), and how many are valid; the rest are 0."""
        length = int(self.regions.lengths[row])
        pixels = np.array(self.features[self.regions.rows[row]], dtype=np.float32)  # (R, F)
        pixels[length:] = 0  # whatever is there, NaN too, would reach the gradient
        return torch.from_numpy(pixels), length


def image_source(
    split: Split, img_res: int | None, augment: bool, cache: ImageCache | None = None
) -> ImageFolderSource | RegionSource | None:
    """Return what reads the split's images; `img_res` None is for a method without pixels.

    Regions are not for the `cache`: they lie ready already.
    """
    if img_res is None:
        return None
    if split.regions is not None:
        return RegionSource(split.regions)
    return ImageFolderSource(split.image_files, img_res, augment, cache)


# ---------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    """One row of a batch to be; `bad_path` names an image that can't be decoded."""

    row: int
    pixels: Tensor | None = None
    pixel_length: int | None = None  # valid regions; None for pixels
    ids: list[int] | None = None
    caption: int | None = None
    dense_ids: list[int] | None = None
    bad_path: str | None = None


class TrainSet(Dataset):
    """Training pairs: item (epoch, index) is caption `index` with its image.

    Its augmentation depends on (seed, epoch, index) alone: not on workers, ranks or a resumed run.
    Dense texts come along, not augmented, where `max_dense_word` is given; pixels do not where
    `img_res` is None.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: WordTokenizer,
        img_res: int | None,
        max_word: int,
        augment_images: bool = True,
        augment_words: bool = True,
        seed: int = 0,
        max_dense_word: int | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.source = image_source(split, img_res, augment_images, cache)
        self.max_word = max_word
        self.augment_words = augment_words
        self.seed = seed
        self.max_dense_word = max_dense_word

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        row = int(self.split.caption_image[index])
        rng = _generator(SAMPLE_STREAM, self.seed, epoch, index)
        sample = self.source.sample(row, rng) if self.source else Sample(row)
        if sample.bad_path is not None:
            return sample
        ids = self._word_ids(self.split.captions[index], rng)
        dense_ids = _dense_ids(self.split, row, self.tokenizer, self.max_dense_word)
        return replace(sample, ids=ids, caption=index, dense_ids=dense_ids)

    def _word_ids(self, caption: str, rng: np.random.Generator) -> list[int]:
        if not self.augment_words:
            return self.tokenizer.encode(caption, self.max_word)
        return self.tokenizer.augment(self.tokenizer.encode_words(caption, self.max_word), rng)


class EvalImages(Dataset):
    """Each image of a split once, in order, with its dense text where `max_dense_word` is given."""

    def __init__(
        self,
        split: Split,
        img_res: int | None,
        tokenizer: WordTokenizer | None = None,
        max_dense_word: int | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.split = split
        self.source = image_source(split, img_res, augment=False, cache=cache)
        self.tokenizer = tokenizer
        self.max_dense_word = max_dense_word

    def __len__(self) -> int:
        return len(self.split.image_ids)

    def __getitem__(self, row: int) -> Sample:
        sample = self.source.sample(row) if self.source else Sample(row)
        if sample.bad_path is not None:
            return sample
        dense_ids = _dense_ids(self.split, row, self.tokenizer, self.max_dense_word)
        return replace(sample, dense_ids=dense_ids)


class EvalCaptions(Dataset):
    """Each caption of a split once, in order; with its image's dense text where asked for."""

    def __init__(
        self,
        split: Split,
        tokenizer: WordTokenizer,
        max_word: int,
        max_dense_word: int | None = None,
    ) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.max_word = max_word
        self.max_dense_word = max_dense_word

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.split.caption_image[index])
        ids = self.tokenizer.encode(self.split.captions[index], self.max_word)
        dense_ids = _dense_ids(self.split, row, self.tokenizer, self.max_dense_word)
        return Sample(row, ids=ids, caption=index, dense_ids=dense_ids)


def _dense_ids(
    split: Split, row: int, tokenizer: WordTokenizer, max_dense_word: int | None
) -> list[int] | None:
    return None if max_dense_word is None else tokenizer.encode(split.dense[row], max_dense_word)


def _generator(*parts: int) -> np.random.Generator:
    return np.random.default_rng([part % 2**32 for part in parts])


# ---------------------------------------------------------------------------------------- loaders


class PairSampler(BatchSampler):
    """Batches of (epoch, index) keys: each epoch its own permutation of the training pairs.

    Step s of an epoch takes the same `batch_size * world` pairs whatever their share: rank r gets
    the r-th slice of them. The last, incomplete global batch is left out. The epoch travels with
    the index because persistent workers keep the data set they started with.
    Raises InputError where not one batch can be filled.
    """

    def __init__(
        self, num_pairs: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1
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
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch that the next iteration runs, from its step `start_step` on."""
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Steps in a whole epoch, wherever it starts."""
        return self.num_pairs // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = _generator(ORDER_STREAM, self.seed, self.epoch).permutation(self.num_pairs)
        for step in range(self.start_step, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[first : first + self.batch_size]]


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
        regions = good[0].pixel_length is not None
        batch = Batch(
            pixels=None if good[0].pixels is None else torch.stack([one.pixels for one in good]),
            pixel_lengths=torch.tensor([one.pixel_length for one in good]) if regions else None,
            ids=ids,
            lengths=lengths,
            image_ids=torch.tensor([one.row for one in good]),
            caption_index=None if ids is None else torch.tensor([one.caption for one in good]),
            dense_ids=dense_ids,
            dense_lengths=dense_lengths,
        )
        return batch, bad_paths

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
        where no pair is left.
        """
        self._sampler.set_epoch(epoch, start_step)
        return iter(self._loader)


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

    def __iter__(self) -> Iterator[Batch]:
        for batch, bad_paths in self._loader:
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
) -> TrainLoader:
    """Return the loader of training batches of `batch_size` pairs per process.

    Raises InputError where the data set does not fill one batch.
    """
    sampler = PairSampler(len(dataset), batch_size, dataset.seed, rank, world)
    loader = _loader(dataset, dataset.tokenizer, num_workers, pin_memory, batch_sampler=sampler)
    return TrainLoader(loader, sampler)


def image_loader(
    dataset: EvalImages,
    batch_size: int,
    indices: Sequence[int] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EvalLoader:
    """Return the loader of images in order; `indices` are the rows of this rank's shard."""
    order = {"batch_size": batch_size, "sampler": indices}
    return EvalLoader(_loader(dataset, dataset.tokenizer, num_workers, pin_memory, **order))


def caption_loader(
    dataset: EvalCaptions,
    batch_size: int,
    indices: Sequence[int] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EvalLoader:
    """Return the loader of captions in order; `indices` are the captions of this rank's shard."""
    order = {"batch_size": batch_size, "sampler": indices}
    return EvalLoader(_loader(dataset, dataset.tokenizer, num_workers, pin_memory, **order))


def _loader(
    dataset: Dataset, tokenizer: WordTokenizer | None, workers: int, pin_memory: bool, **order
) -> DataLoader:
    workers = min(workers, os.cpu_count() or 1)
    if workers:
        # OpenCV's thread pool does not survive a fork: a worker that inherits one can hang. Here,
        # in the parent, it is taken down; workers are what decodes in parallel.
        cv2.setNumThreads(1)
    return DataLoader(
        dataset,
        collate_fn=Collate(tokenizer.pad_id if tokenizer else 0),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_process_group,
        # a loader without its own generator draws from the model's, and a resumed run would differ
        generator=torch.Generator(),
        **order,
    )


def _leave_process_group(_: int) -> None:
    """Keep Ctrl-C and a SIGTERM for the whole group from the workers: the training loop decides.

    A worker must go on obeying a SIGTERM of its own: that is how the interpreter ends workers when
    it exits, and it would wait for ever for one that ignored it. It ends without an error then, so
    that a signal to every process (a scheduler's) does not interrupt the step under way.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
