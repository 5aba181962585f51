"""Pictures that look the same: perceptual hashes, and the groups of near ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib.data.extras import need

BITS = 64
BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def hash_images(
    root: Path,
    names: Sequence[str],
    journal: Path,
    workers: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, int | None]:
    """Return the 64-bit perceptual hash (imagehash.phash) of each image, None where none decodes.

    Each is appended to `journal`, from which a run that was stopped goes on.
    """
    need("imagehash", "imagehash", "--near, which looks for near-duplicates,")
    known = _read_journal(journal)
    waiting = [name for name in names if name not in known]
    progress(len(names) - len(waiting))
    with open(journal, "a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        for name, value in zip(waiting, pool.map(lambda one: _hash(root / one), waiting)):  # noqa: B905
            known[name] = value
            file.write(json.dumps([name, value]) + "\n")
            progress(1)
    return {name: known[name] for name in names}


def _hash(path: Path) -> int | None:
    import imagehash
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("L", (256, 256))  # a JPEG is decoded small: three times as fast
            return int(str(imagehash.phash(image)), 16)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _read_journal(path: Path) -> dict[str, int | None]:
    """Return what whole lines of the journal say; a killed run may have cut the last one off."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if len(whole) < len(text):
        path.write_text(whole, encoding="utf-8")
    return dict(json.loads(line) for line in whole.splitlines())


def near_groups(hashes: Sequence[int | None], most: int) -> np.ndarray:
    """Return a group number an image: images joined by hashes that differ in at most `most` bits.

    An image without a hash is a group of its own. Exact: two hashes within `most` bits agree in
    one of `most` + 1 bands of bits, so only images that share a band are compared.
    """
    known = [index for index, value in enumerate(hashes) if value is not None]
    values, inverse = np.unique(
        np.array([hashes[index] for index in known], dtype=np.uint64), return_inverse=True
    )
    parent = np.arange(len(values))
    edges = np.linspace(0, BITS, most + 2).round().astype(int)
    for low, high in pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        band = (values >> np.uint64(low)) & mask
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        for members in np.split(order, starts):
            if len(members) > 1:
                _join_near(values, members, most, parent)
    groups = np.arange(len(hashes)) + len(values)
    groups[known] = [_root(parent, one) for one in inverse.ravel()]
    return np.unique(groups, return_inverse=True)[1].ravel()


def _join_near(values: np.ndarray, members: np.ndarray, most: int, parent: np.ndarray) -> None:
    for place, first in enumerate(members[:-1]):
        others = members[place + 1 :]
        differing = values[others] ^ values[first]
        distance = BITS_SET[differing.view(np.uint8).reshape(-1, 8)].sum(1)
        for other in others[distance <= most]:
            parent[_root(parent, other)] = _root(parent, first)


def _root(parent: np.ndarray, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return int(index)
