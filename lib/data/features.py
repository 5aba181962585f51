"""Last hidden states of a frozen image encoder on disk, so that each image is encoded once."""

from __future__ import annotations

import hashlib
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.data.images import CROP_RATIO, CROP_SCALE
from lib.data.loaders import make_loader
from lib.data.sources import ImageFolderSource, Sample, seeded_generator
from lib.data.workers import watched
from lib.distributed import hosts_without, rank, together, world_size
from lib.errors import InputError
from lib.files import write_json

VERSION = 1  # of the files' layout and of how images are prepared; part of every entry's name
MAGIC = b"seps-fea"
HEADER = struct.Struct("<8s3I")  # magic, tokens, channels, CRC-32 of the numbers
VIEW_STREAM = 2  # keeps the draws of cached views apart from those of samples and of their order
PLAIN = 0  # the view that evaluation reads; views 1, 2, … are cropped and flipped

Key = tuple[str, int]  # an image file and the number of its view


class FeatureCache:
    """A folder of float16 features (tokens, channels), one file for each view of an image.

    `encoder` names everything that the numbers depend on beside the image: the encoder's weights,
    its resolution, preprocessing and precision; it has a folder of its own in `folder`. An entry's
    name is the hash of its image's path (links to its folder resolved), time and size, so that a
    changed image is encoded anew. Entries appear whole or not at all: processes, runs and machines
    may fill and read one folder at the same time. Raises InputError where it can't be written to.
    """

    def __init__(
        self, folder: str | os.PathLike, encoder: str, tokens: int, channels: int, views: int = 0
    ) -> None:
        self.folder = Path(folder).absolute() / encoder
        self.shape = (tokens, channels)
        self.views = views
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"--feature_cache {folder} can't be written to ({error.strerror}); name a folder "
                "that can, or leave the flag out"
            ) from None

    def source(self, files: Sequence[str], augment: bool) -> FeatureSource:
        """Return what reads the features of `files`, of augmented views where there are any."""
        return FeatureSource(files, self, augment)

    @property
    def entry_bytes(self) -> int:
        """Size of one file."""
        return HEADER.size + 2 * self.shape[0] * self.shape[1]

    def describe(self, facts: dict) -> None:
        """Write about.json, for whoever wonders what the folder is."""
        write_json(self.folder / "about.json", {**facts, "tokens, channels": list(self.shape)})

    def entry(self, key: Key) -> Path | None:
        """Return the file that keeps a view, whether it is there or not; None without an image."""
        path, view = key
        folder, file = os.path.split(os.path.abspath(path))
        try:
            status = os.stat(path)
        except OSError:
            return None
        crops = (CROP_SCALE, CROP_RATIO, view) if view else "whole"
        real = os.path.join(os.path.realpath(folder), file)
        text = f"{VERSION}\n{crops}\n{status.st_mtime_ns}\n{status.st_size}\n{real}"
        name = hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the views that are not kept whole; those of images that are gone are left out."""
        lacking = []
        for key in keys:
            entry = self.entry(key)
            if entry is None:
                continue
            try:
                whole = os.stat(entry).st_size == self.entry_bytes
            except OSError:
                whole = False
            if not whole:
                lacking.append(key)
        return lacking

    def write(self, key: Key, hidden: np.ndarray) -> None:
        """Keep one view's float16 features (tokens, channels). Raises OSError where it can't."""
        entry = self.entry(key)
        if entry is None:
            return
        data = np.ascontiguousarray(hidden, dtype=np.float16)
        if data.shape != self.shape:
            raise ValueError(f"features of shape {data.shape}, not {self.shape}")
        temporary = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.part")
        try:
            entry.parent.mkdir(exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(HEADER.pack(MAGIC, *self.shape, zlib.crc32(data)))
                file.write(data)
            os.replace(temporary, entry)  # readers see no entry or a whole one
        finally:
            with suppress(OSError):
                temporary.unlink()

    def read(self, key: Key) -> Tensor | None:
        """Return one view's features, float16 (tokens, channels), through a memory map.

        None where there are none. A file whose checksum disagrees is removed, and counts as none:
        the next run encodes it anew.
        """
        entry = self.entry(key)
        if entry is None:
            return None
        try:
            raw = np.memmap(entry, mode="r")
        except (OSError, ValueError):  # missing, or empty
            return None
        if raw.size == self.entry_bytes:
            magic, tokens, channels, checksum = HEADER.unpack(raw[: HEADER.size].tobytes())
            numbers = raw[HEADER.size :]
            if (magic, tokens, channels) == (MAGIC, *self.shape) and zlib.crc32(
                numbers
            ) == checksum:
                return torch.from_numpy(np.array(numbers).view(np.float16).reshape(self.shape))
        with suppress(OSError):
            os.unlink(entry)
        return None


class FeatureSource:
    """Cached features of image files in the place of pixels; row r is of `files[r]`.

    To `augment` it draws one of the cache's augmented views; without any, all reads are plain.
    """

    def __init__(self, files: Sequence[str], cache: FeatureCache, augment: bool) -> None:
        self.files = files
        self.cache = cache
        self.views = cache.views if augment else 0

    def sample(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return the sample of image `row`; one without whole features names its file."""
        features = self.read(row, rng)
        return Sample(row, features, bad_path=self.files[row] if features is None else None)

    def read(self, row: int, rng: np.random.Generator | None = None) -> Tensor | None:
        """Return the features of image `row`, float16 (tokens, channels); None where none are."""
        view = 1 + int(rng.integers(self.views)) if self.views else PLAIN
        return self.cache.read((self.files[row], view))


def wanted_views(files: Iterable[str], augment: bool, cache: FeatureCache) -> list[Key]:
    """Return the views that a split of image `files` is read in."""
    views = range(1, cache.views + 1) if augment and cache.views else [PLAIN]
    return [(path, view) for path in files for view in views]


class _Views(Dataset):
    """Pixels of views, uint8 (3, H, W), with their place in `keys`; None for undecodable images."""

    def __init__(self, keys: Sequence[Key], size: tuple[int, int], resample: str) -> None:
        self.keys = keys
        self.size = size
        files = [path for path, _ in keys]
        self.plain = ImageFolderSource(files, size, augment=False, resample=resample)
        self.cropped = ImageFolderSource(files, size, augment=True, resample=resample)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        path, view = self.keys[index]
        if view == PLAIN:
            return index, self.plain.read(index)
        name = zlib.crc32(os.fsencode(os.path.basename(path)))
        return index, self.cropped.read(index, seeded_generator(VIEW_STREAM, name, view))


def fill(
    cache: FeatureCache,
    keys: Sequence[Key],
    encode: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    *,
    resample: str = "bicubic",
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Encode the views `keys` and keep them; return how many images could not be decoded.

    `encode` takes uint8 pixels (B, 3, H, W) to hidden states (B, tokens, channels); `progress` is
    told after each batch how many views are done. Raises InputError where the numbers leave
    float16's range, OSError where they can't be written, WorkerError where a worker ends.
    """
    views_read = _Views(keys, size, resample)
    loader = make_loader(views_read, None, workers, False, collate=list, batch_size=batch_size)
    done = bad = 0
    for views in watched(loader):
        good = [(index, pixels) for index, pixels in views if pixels is not None]
        if good:
            hidden = encode(torch.stack([pixels for _, pixels in good])).half()
            if not hidden.isfinite().all():
                raise InputError(
                    "--feature_cache: the encoder's last hidden state leaves the range of float16 "
                    f"at {keys[good[0][0]][0]}; train without the cache"
                )
            for (index, _), one in zip(good, hidden.cpu().numpy(), strict=True):
                cache.write(keys[index], one)
        bad += len(views) - len(good)
        done += len(views)
        progress(done)
    return bad


def fill_share(
    cache: FeatureCache,
    wanted: Sequence[Key],
    encode: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    *,
    resample: str = "bicubic",
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Encode what is missing of this process's share of the `wanted` views, as `fill` does.

    Its share is a slice of all views, not of the missing ones: while one process looks for those,
    another may write some. What goes wrong on one is raised on all.

    `say` tells how many and how fast. Raises InputError where some machine does not see the folder.
    """
    unseen = hosts_without(cache.folder)
    if unseen:
        raise InputError(
            f"--feature_cache {cache.folder}: {', '.join(unseen)} does not see what rank 0 writes "
            "there; name a folder on a disk that all nodes share"
        )
    with together():
        share = cache.missing(wanted[rank() :: world_size()])
        if share:
            started = time.perf_counter()
            with tqdm(total=len(share), desc="encoding images", unit="image", ncols=80) as bar:
                bad = fill(
                    cache,
                    share,
                    encode,
                    size,
                    resample=resample,
                    workers=workers,
                    progress=lambda done: bar.update(done - bar.n),
                )
            seconds = time.perf_counter() - started
            told = f"; {bad} could not be decoded" if bad else ""
            rate = len(share) / seconds
            say(f"encoded {len(share) - bad} views in {seconds:.0f} s, {rate:.1f} images/s{told}")
