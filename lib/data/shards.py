"""Training pairs that stream out of shards, for sets that outgrow a disk.

Each epoch draws an order of the shards and deals them out to the workers of all ranks; a shard's
samples pass through a shuffling buffer that begins anew with each shard. So a worker's stream
follows from (seed, epoch) alone: a resumed epoch skips the shards that are through without opening
them and, in the one under way, the samples that were used, undecoded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from lib.data.dense_texts import dense_records
from lib.data.extras import need
from lib.data.packed import PackedTexts
from lib.data.sources import SAMPLE_STREAM, ImageFolderSource, Sample, Tokenizer, seeded_generator
from lib.data.tars import TarSample, expand_shards, read_samples, shard_name, shard_sizes
from lib.errors import InputError

SHARD_STREAM = 3  # keeps the draws of shards apart from those of pairs and samples
BUFFER = 1000  # samples that are shuffled at a time, undecoded


class SampleNames(Sequence):
    """Names of samples by row, for messages: shard and place in it."""

    def __init__(self, paths: Sequence[str], sizes: np.ndarray) -> None:
        self._paths, self._ends = paths, np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> str:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return f"{shard_name(self._paths[shard])} sample {row - first}"


@dataclass(frozen=True)
class DenseTexts:
    """Dense texts of a .jsonl by a sample's key; for samples that carry none themselves."""

    row_of: dict[str, int]
    texts: PackedTexts

    def get(self, key: str) -> str | None:
        """Return the text of sample `key`, None where there is none."""
        row = self.row_of.get(key)
        return None if row is None else self.texts[row]


@dataclass(frozen=True)
class ShardSet:
    """The training split in shards, in the place of a `Split`."""

    paths: list[str]
    sizes: np.ndarray  # (shards,) samples
    captions: list[str]  # of the first shard, what a vocabulary is learnt from
    dense: list[str] | None  # likewise
    dense_texts: DenseTexts | None = None
    name: str = "train"

    @property
    def image_ids(self) -> SampleNames:
        """Names of the images by row."""
        return SampleNames(self.paths, self.sizes)


def open_shards(
    pattern: str,
    sizes: Path | None = None,
    needs_dense: bool = False,
    dense_file: Path | None = None,
    way_out: str = "",
) -> ShardSet:
    """Return the training split that a pattern of tar files names, its first shard read.

    Dense texts come with the samples (`dense`, or in their json) or from `dense_file`, by key.
    Raises InputError for shards that are missing or damaged, or lack what is needed.
    """
    paths = expand_shards(pattern)
    counts = shard_sizes(paths, sizes)
    texts = _read_dense(dense_file) if needs_dense and dense_file and dense_file.exists() else None
    first = list(read_samples(paths[0]))
    captions = [caption for one in first for caption in one.captions]
    if not captions:
        raise InputError(f"{paths[0]}: no sample has a caption (.txt, or captions in .json)")
    dense = None
    if needs_dense:
        dense = [text for one in first if (text := _dense_of(one, texts))]
        if not dense:
            raise InputError(
                f"{paths[0]}: the method needs dense texts, but neither the samples carry any "
                f"(.dense, or dense in .json) nor {dense_file}; {way_out}"
            )
    return ShardSet(paths, counts, captions, dense, texts)


def _read_dense(path: Path) -> DenseTexts:
    records = dense_records(path, "")
    row_of = {str(one.get("image_id")): row for row, one in enumerate(records)}
    return DenseTexts(row_of, PackedTexts([one["text"] for one in records]))


def _dense_of(sample: TarSample, texts: DenseTexts | None) -> str | None:
    if sample.dense is not None:
        return sample.dense
    return None if texts is None else texts.get(sample.key)


@dataclass(frozen=True)
class Share:
    """A process's share of the work, and where an epoch stands."""

    batch_size: int
    steps: int  # batches of the whole epoch
    rank: int = 0
    world: int = 1
    workers: int = 1  # of each process
    epoch: int = 0
    start_step: int = 0


class ShardStream(IterableDataset):
    """One epoch's samples of a process, batch after batch, each worker its own shards.

    A sample is one pair: its image and one of its captions, drawn. What it becomes depends on
    (seed, epoch, row) alone. Where a worker's shards hold less than its share, it goes round again.
    """

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: Tokenizer,
        source: ImageFolderSource | None,
        share: Share,
        max_word: int,
        augment_words: bool = True,
        seed: int = 0,
        max_dense_word: int | None = None,
        augment_dense: bool = False,
    ) -> None:
        self.shards = shards
        self.tokenizer = tokenizer
        self.source = source
        self.share = share
        self.max_word = max_word
        self.augment_words = augment_words
        self.seed = seed
        self.max_dense_word = max_dense_word
        self.augment_dense = augment_dense
        self._first_row = np.cumsum(shards.sizes) - shards.sizes

    def __iter__(self) -> Iterator[Sample]:
        share, info = self.share, get_worker_info()
        number = info.id if info is not None else 0
        # the loader takes its batches from worker 0 on, wherever in the epoch it starts
        worker = (number + share.start_step) % share.workers
        used = len(range(worker, share.start_step, share.workers)) * share.batch_size
        wanted = len(range(worker, share.steps, share.workers)) * share.batch_size
        for round_, row, sample in self._stream(worker, used, wanted - used):
            yield self._pair(sample, row, round_)

    def _stream(self, worker: int, used: int, wanted: int) -> Iterator[tuple[int, int, TarSample]]:
        """Yield `wanted` (round, row, sample) of a worker's stream behind the `used` first."""
        share, round_ = self.share, 0
        while wanted > 0:
            order = seeded_generator(SHARD_STREAM, self.seed, share.epoch, round_).permutation(
                len(self.shards.paths)
            )
            for shard in order[share.rank * share.workers + worker :: share.world * share.workers]:
                size = int(self.shards.sizes[shard])
                if used >= size:
                    used -= size
                    continue
                for row, sample in self._shuffled(int(shard), round_):
                    if used:
                        used -= 1
                    elif wanted:
                        wanted -= 1
                        yield round_, row, sample
                if not wanted:
                    return
            round_ += 1

    def _shuffled(self, shard: int, round_: int) -> Iterator[tuple[int, TarSample]]:
        """Yield (row, sample) of a shard in an order of this epoch's."""
        filters = need("webdataset.filters", "webdataset", "--shards")
        draw = seeded_generator(SHARD_STREAM, self.seed, self.share.epoch, round_, shard)
        rng = random.Random(int(draw.integers(2**62)))
        shuffled = filters.shuffle(BUFFER, initial=BUFFER, rng=rng)
        yield from shuffled(self._rows(shard))

    def _rows(self, shard: int) -> Iterator[tuple[int, TarSample]]:
        """Yield (row, sample) of a shard as it lies; InputError where the counts disagree."""
        path, size = self.shards.paths[shard], int(self.shards.sizes[shard])
        found = 0
        for sample in read_samples(path):
            if found == size:
                break
            yield int(self._first_row[shard]) + found, sample
            found += 1
        if found < size:
            raise InputError(
                f"{path} holds {found} samples, not {size}: it was cut off, or sizes.json is of "
                "other shards"
            )

    def _pair(self, sample: TarSample, row: int, round_: int) -> Sample:
        rng = seeded_generator(SAMPLE_STREAM, self.seed, self.share.epoch, row, round_)
        if sample.fault is not None:
            return Sample(row, bad_path=sample.fault)
        if not sample.captions:
            return Sample(row, bad_path=f"{sample.key} (no caption)")
        caption = sample.captions[int(rng.integers(len(sample.captions)))]
        pixels = None
        if self.source is not None:
            pixels = self.source.read_bytes(sample.image, rng)
            if pixels is None:
                return Sample(row, bad_path=sample.key)
        ids = self._ids(caption, self.max_word, self.augment_words, rng)
        dense_ids = None
        if self.max_dense_word is not None:
            dense = _dense_of(sample, self.shards.dense_texts)
            if dense is None:
                return Sample(row, bad_path=f"{sample.key} (no dense text)")
            dense_ids = self._ids(dense, self.max_dense_word, self.augment_dense, rng)
        return Sample(row, pixels, ids=ids, caption=row, dense_ids=dense_ids)

    def _ids(self, text: str, max_word: int, augment: bool, rng: np.random.Generator) -> list[int]:
        if not augment:
            return self.tokenizer.encode(text, max_word)
        return self.tokenizer.augment(self.tokenizer.encode_words(text, max_word), rng)
