"""One image, caption or pair of a split, read and turned into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lib.batch import image_size
from lib.data.image_cache import ImageCache, PreparedImage
from lib.data.images import (
    CROP_RATIO,
    CROP_SCALE,
    decode,
    decode_bytes,
    random_crop_and_flip,
    resize,
    shrink,
)
from lib.data.packed import PackedTexts
from lib.data.splits import Regions, Split, map_array

CUT_SAMPLE = 2000  # dense texts whose length is counted
UNCUT = 1 << 20  # more word pieces than any text has
SAMPLE_STREAM = 1  # keeps the draws of the samples apart from those of the order


class Tokenizer(Protocol):
    """What turns texts into word ids; vocab.py has the one that the programs use."""

    pad_id: int

    def encode(self, text: str, max_word: int) -> list[int]:
        """Return at most `max_word` ids, special tokens included."""

    def encode_words(self, text: str, max_word: int) -> list[list[int]]:
        """Return the same ids grouped by whole word, without the special tokens."""

    def augment(self, words: Sequence[Sequence[int]], rng: np.random.Generator) -> list[int]:
        """Return the ids of a caption with some of its words changed."""


class ImageSource(Protocol):
    """What reads the images of a split, row by row."""

    def sample(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return the sample of image `row`; `rng` draws the augmentation."""


class ImageFolderSource:
    """Image files read as (3, img_res, img_res) uint8 RGB; row r is `files[r]`.

    `img_res` may also be (height, width); `resample` is the filter that the image encoder likes.

    A `cache` keeps them resized, and what is read is the same to the bit. To `augment` it keeps
    them shrunk, so far that the smallest crop that can be drawn still has img_res pixels a side:
    the same boxes are drawn to within a rounding, but pixels resampled twice differ, by about 2 of
    255 on average (640x480 at img_res 224). Images that need no shrinking stay the same to the bit.
    """

    def __init__(
        self,
        files: Sequence[str],
        img_res: int | Sequence[int],
        augment: bool,
        cache: ImageCache | None = None,
        resample: str = "bicubic",
    ) -> None:
        self.files = files
        self.size = image_size(img_res)
        self.resample = resample
        self.augment = augment
        self.cache = cache
        square = self.size[0] == self.size[1]
        self._settings = f"{self.size[0] if square else self.size} "
        self._settings += str((CROP_SCALE, CROP_RATIO)) if augment else "whole"
        if resample != "bicubic" and not augment:  # to be cropped, they are shrunk bicubic
            self._settings += f" {resample}"

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
        return None if image is None else self._view(image, rng)

    def read_bytes(self, data: bytes, rng: np.random.Generator | None = None) -> Tensor | None:
        """Return an image file's bytes as `read` returns the file; never cached."""
        image = self._fit(decode_bytes(data))
        return None if image is None else self._view(image, rng)

    def _view(self, image: PreparedImage, rng: np.random.Generator | None) -> Tensor:
        pixels = torch.from_numpy(image.pixels)
        if not self.augment:
            return pixels
        pixels = pixels.permute(2, 0, 1)  # (3, H, W)
        crop = random_crop_and_flip(pixels, self.size, rng, image.full_size, self.resample)
        return crop.flip(0)

    def _prepare(self, path: str) -> PreparedImage | None:
        """Return what does not depend on chance: resized RGB (3, ...), to augment BGR (..., 3)."""
        return self._fit(decode(path))

    def _fit(self, pixels: np.ndarray | None) -> PreparedImage | None:
        """Return decoded pixels, (H, W, 3) BGR, as `_prepare` does."""
        if pixels is None:
            return None
        full_size = pixels.shape[:2]
        if not self.augment:
            planes = torch.from_numpy(pixels).permute(2, 0, 1)
            resized = resize(planes, *self.size, self.resample)
            pixels = resized.flip(0).numpy()  # RGB, after resizing, where there is less to move
        elif self.cache is not None:
            pixels = shrink(pixels, self.size)
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


class Features(Protocol):
    """What hands out features in the place of pixels; lib.data.features has the one in use."""

    def source(self, files: Sequence[str], augment: bool) -> ImageSource:
        """Return what reads the features of `files`; row r is of `files[r]`."""


def image_source(
    split: Split,
    img_res: int | Sequence[int] | None,
    augment: bool,
    cache: ImageCache | None = None,
    resample: str = "bicubic",
    features: Features | None = None,
) -> ImageSource | None:
    """Return what reads the split's images; `img_res` None is for a method without pixels.

    Regions are not for the `cache`: they lie ready already. `features` take the place of pixels.
    """
    if img_res is None:
        return None
    if split.regions is not None:
        return RegionSource(split.regions)
    files = PackedTexts(split.image_files)
    if features is not None:
        return features.source(files, augment)
    return ImageFolderSource(files, img_res, augment, cache, resample)


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
    Dense texts come along where `max_dense_word` is given, their words changed only where
    `augment_dense` says so; pixels do not where `img_res` is None.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer,
        img_res: int | Sequence[int] | None,
        max_word: int,
        augment_images: bool = True,
        augment_words: bool = True,
        seed: int = 0,
        max_dense_word: int | None = None,
        cache: ImageCache | None = None,
        resample: str = "bicubic",
        features: Features | None = None,
        augment_dense: bool = False,
    ) -> None:
        self.captions = PackedTexts(split.captions)
        self.caption_image = split.caption_image
        self.dense = _packed_dense(split, max_dense_word)
        self.tokenizer = tokenizer
        self.source = image_source(split, img_res, augment_images, cache, resample, features)
        self.max_word = max_word
        self.augment_words = augment_words
        self.seed = seed
        self.max_dense_word = max_dense_word
        self.augment_dense = augment_dense

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        row = int(self.caption_image[index])
        rng = seeded_generator(SAMPLE_STREAM, self.seed, epoch, index)
        sample = self.source.sample(row, rng) if self.source else Sample(row)
        if sample.bad_path is not None:
            return sample
        ids = self._word_ids(self.captions[index], self.max_word, self.augment_words, rng)
        dense_ids = None
        if self.max_dense_word is not None:
            text = self.dense[row]
            dense_ids = self._word_ids(text, self.max_dense_word, self.augment_dense, rng)
        return replace(sample, ids=ids, caption=index, dense_ids=dense_ids)

    def _word_ids(self, text: str, most: int, augment: bool, rng: np.random.Generator) -> list[int]:
        if not augment:
            return self.tokenizer.encode(text, most)
        return self.tokenizer.augment(self.tokenizer.encode_words(text, most), rng)


class EvalImages(Dataset):
    """Each image of a split once, in order, with its dense text where `max_dense_word` is given."""

    def __init__(
        self,
        split: Split,
        img_res: int | Sequence[int] | None,
        tokenizer: Tokenizer | None = None,
        max_dense_word: int | None = None,
        cache: ImageCache | None = None,
        resample: str = "bicubic",
        features: Features | None = None,
    ) -> None:
        self.images = len(split.image_ids)
        self.dense = _packed_dense(split, max_dense_word)
        self.source = image_source(split, img_res, False, cache, resample, features)
        self.tokenizer = tokenizer
        self.max_dense_word = max_dense_word

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, row: int) -> Sample:
        sample = self.source.sample(row) if self.source else Sample(row)
        if sample.bad_path is not None:
            return sample
        dense_ids = _dense_ids(self.dense, row, self.tokenizer, self.max_dense_word)
        return replace(sample, dense_ids=dense_ids)


class EvalCaptions(Dataset):
    """Each caption of a split once, in order; with its image's dense text where asked for."""

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer,
        max_word: int,
        max_dense_word: int | None = None,
    ) -> None:
        self.captions = PackedTexts(split.captions)
        self.caption_image = split.caption_image
        self.dense = _packed_dense(split, max_dense_word)
        self.tokenizer = tokenizer
        self.max_word = max_word
        self.max_dense_word = max_dense_word

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.caption_image[index])
        ids = self.tokenizer.encode(self.captions[index], self.max_word)
        dense_ids = _dense_ids(self.dense, row, self.tokenizer, self.max_dense_word)
        return Sample(row, ids=ids, caption=index, dense_ids=dense_ids)


def _packed_dense(split: Split, max_dense_word: int | None) -> PackedTexts | None:
    return None if max_dense_word is None else PackedTexts(split.dense)


def _dense_ids(
    dense: PackedTexts | None, row: int, tokenizer: Tokenizer, max_dense_word: int | None
) -> list[int] | None:
    return None if dense is None else tokenizer.encode(dense[row], max_dense_word)


def seeded_generator(*parts: int) -> np.random.Generator:
    """Return a generator that the numbers name: the same ones draw the same values."""
    return np.random.default_rng([part % 2**32 for part in parts])


def cut_line(name: str, texts: Sequence[str], tokenizer: Tokenizer, words: int) -> str:
    """Return a line that says which share of dense texts is cut at `words` word pieces.

    Of many texts an evenly spread sample is counted.
    """
    chosen = np.linspace(0, len(texts) - 1, min(len(texts), CUT_SAMPLE)).astype(int)
    lengths = [len(tokenizer.encode(texts[row], UNCUT)) for row in chosen]
    share = 100 * np.mean(np.array(lengths) > words)
    of = "" if len(chosen) == len(texts) else f" of {len(chosen):,} sampled"
    median = f"median {np.median(lengths):.0f}"
    return f"dense texts of {name}: {share:.0f} %{of} cut at {words} word pieces, {median}"
