"""Prepared images on disk, one file each, so that a JPEG is decoded once and not every epoch."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from lib.errors import InputError

VERSION = 1  # of the files' layout and of how images are prepared; part of every entry's name
MAGIC = b"seps-img"
# magic, the source's mtime in ns and bytes, the array's three sides, the source's height and width
HEADER = struct.Struct("<8sqq3I2I")


@dataclass(frozen=True)
class PreparedImage:
    """Pixels ready for use, uint8 with three axes, and the (height, width) they were made from."""

    pixels: np.ndarray
    full_size: tuple[int, int]


class ImageCache:
    """A folder of prepared images that processes, machines and colleagues may share.

    An entry's name is the hash of its source's path (links to its folder resolved) and of the
    settings. Its header holds the source's time and size: one that does not match the source as it
    is now is made anew. Nothing is ever removed. Raises InputError where the folder can't be made
    or written to.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = os.path.abspath(folder)
        try:
            os.makedirs(self.folder, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(
                f"--image_cache {folder} can't be written to ({error.strerror}); name a folder "
                "that can, or leave the flag out"
            ) from None

    def get(
        self, path: str, settings: str, make: Callable[[], PreparedImage | None]
    ) -> PreparedImage | None:
        """Return the image of file `path`: as kept under `settings`, else made by `make` and kept.

        None, which is what `make` gives for a bad file, is not kept, and returned for one that is
        gone. An entry that can't be written costs one warning per process and nothing else.
        """
        try:
            status = os.stat(path)  # before the file is read: a change meanwhile must show
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_size)
        entry = self.entry(path, settings)
        image = _read(entry, stamp)
        if image is None:
            image = make()
            if image is not None:
                self._write(entry, stamp, image)
        return image

    def entry(self, path: str, settings: str) -> str:
        """Return the file that keeps `path` under `settings`, whether it is there or not."""
        folder, file = os.path.split(os.path.abspath(path))
        key = f"{VERSION}\n{settings}\n{os.path.join(_real_folder(folder), file)}"
        name = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
        return os.path.join(self.folder, name[:2], name[2:])

    def _write(self, entry: str, stamp: tuple[int, int], image: PreparedImage) -> None:
        temporary = f"{entry}.{uuid.uuid4().hex}.part"
        try:
            os.makedirs(os.path.dirname(entry), exist_ok=True)
            with open(temporary, "xb") as file:  # its mode follows the umask, mkstemp's does not
                file.write(HEADER.pack(MAGIC, *stamp, *image.pixels.shape, *image.full_size))
                file.write(np.ascontiguousarray(image.pixels))
            os.replace(temporary, entry)  # readers see no entry or a whole one
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            _warn_once(self.folder, error.strerror)


def _read(entry: str, stamp: tuple[int, int]) -> PreparedImage | None:
    """Return what the file keeps, without a copy; None where it is not the source's, or not whole.

    `stamp` is the (mtime in ns, bytes) that the source has now.
    """
    try:
        with open(entry, "rb", buffering=0) as file:
            data = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
            if file.readinto(data) < max(data.size, HEADER.size):
                return None
    except OSError:
        return None
    magic, *numbers = HEADER.unpack_from(data)
    shape, full_size = numbers[2:5], (numbers[5], numbers[6])
    whole = data.size - HEADER.size == shape[0] * shape[1] * shape[2]
    if magic != MAGIC or tuple(numbers[:2]) != stamp or not whole:
        return None
    return PreparedImage(data[HEADER.size :].reshape(shape), full_size)


@functools.lru_cache(maxsize=1024)  # it asks the file system about each part of the path
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


@functools.cache  # which is what makes it once
def _warn_once(folder: str, reason: str) -> None:
    print(
        f"warning: --image_cache {folder}: an image can't be kept ({reason}); going on without",
        file=sys.stderr,
    )
