"""From a 640x480 JPEG to a tensor: PIL and float, ours, ours with a warm --image_cache; one thread.

The field's way hands over normalised float pixels, ours uint8 ones: those are normalised on the
device, where it costs next to nothing. The files are in the page cache for all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from lib.data.image_cache import ImageCache
from lib.data.images import CROP_SCALE
from lib.data.sources import ImageFolderSource
from lib.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tools.benchmark.measure import check_at_least_one, side_by_side
from tools.benchmark.report import judge

WIDTH, HEIGHT, QUALITY = 640, 480, 90  # about 100 KB an image, as photographs have
IMG_RES = 224
BARS = {"ours": {"ratio": 2}, "cache": {"ratio": 10}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the measuring."""
    parser.add_argument("--images", type=int, default=64, help="JPEG files that are drawn")
    parser.add_argument("--repeats", type=int, default=9, help="the median of so many")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for training and evaluation, without and with the cache.

    `value` is ms per image, `loop` and `ours` are images/s of the field's way and of ours. The
    process keeps to one thread from here on.
    """
    check_at_least_one(args, "images", "repeats")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = draw_jpegs(Path(folder), args.images)
        for task in ("training", "evaluation"):
            ways = _ways(task == "training", files, Path(folder) / "cache")
            calls = {name: _over_all(way, args.images) for name, way in ways.items()}
            seconds = side_by_side(calls, args.repeats, torch.device("cpu"))  # warm-up fills it
            per_image = {name: total / args.images for name, total in seconds.items()}
            rows += [_row(task, name, per_image) for name in BARS]
    return rows


def _row(task: str, name: str, per_image: dict[str, float]) -> dict[str, Any]:
    what = f"{task}, {'cached' if name == 'cache' else 'not cached'}"
    row = {
        "name": what,
        "what": what,
        "value": 1000 * per_image[name],
        "loop": 1 / per_image["loop"],
        "ours": 1 / per_image[name],
        "unit": "images/s",
    }
    return judge(row, BARS[name])


def _ways(train: bool, files: list[str], cache_folder: Path) -> dict[str, Callable[[int], Any]]:
    from PIL import Image  # torchvision needs it: it is there

    transform = field_transform(train)
    plain = ImageFolderSource(files, IMG_RES, augment=train)
    cached = ImageFolderSource(files, IMG_RES, augment=train, cache=ImageCache(cache_folder))
    rng = np.random.default_rng(0)
    return {
        "loop": lambda row: transform(Image.open(files[row]).convert("RGB")),
        "ours": lambda row: plain.read(row, rng),
        "cache": lambda row: cached.read(row, rng),
    }


def _over_all(way: Callable[[int], Any], images: int) -> Callable[[], None]:
    def call() -> None:
        for row in range(images):
            way(row)

    return call


def field_transform(train: bool) -> Callable[[Any], Tensor]:
    """Return torchvision's PIL image -> normalised float pixels (3, IMG_RES, IMG_RES)."""
    from torchvision import transforms  # slow to import, and only the rival needs it

    bicubic = transforms.InterpolationMode.BICUBIC
    size = [transforms.Resize((IMG_RES, IMG_RES), interpolation=bicubic)]
    if train:
        crop = transforms.RandomResizedCrop(IMG_RES, scale=CROP_SCALE, interpolation=bicubic)
        size = [crop, transforms.RandomHorizontalFlip()]
    to_float = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return transforms.Compose([*size, *to_float])


def draw_jpegs(folder: Path, count: int) -> list[str]:
    """Write `count` pictures of soft colours, discs with hard edges and noise; return the files."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        soft = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        picture = cv2.resize(soft, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        for _ in range(30):
            middle = (int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
            colour = tuple(int(part) for part in rng.integers(0, 256, 3))
            cv2.circle(picture, middle, int(rng.integers(5, 80)), colour, -1, cv2.LINE_AA)
        noisy = np.clip(picture + rng.normal(0, 7, picture.shape), 0, 255).astype(np.uint8)
        files.append(str(folder / f"{number}.jpg"))
        cv2.imwrite(files[-1], noisy, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return files
