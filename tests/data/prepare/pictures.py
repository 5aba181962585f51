"""Small pictures and sources that the tests of tools.prepare and its neighbours share."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np


def pixels(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth random picture: different seeds look different to a perceptual hash."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(seed: int, quality: int = 92) -> bytes:
    return cv2.imencode(".jpg", pixels(seed), [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def picture_folder(root: Path, count: int = 20) -> list[str]:
    """Write p00.jpg, p01.jpg, … into `root`; return the names."""
    root.mkdir(parents=True, exist_ok=True)
    names = [f"p{number:02d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (root / name).write_bytes(jpeg(number))
    return names


def captions_of(name: str, each: int = 2) -> list[str]:
    return [f"caption {k} of {name}, a picture" for k in range(each)]


def caption_csv(path: Path, names: list[str], head: str = "image,caption", each: int = 2) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head.split(","))
        writer.writerows([name, text] for name in names for text in captions_of(name, each))
    return path


def karpathy_json(path: Path, dataset: str = "flickr8k", counts=(6, 2, 2), each: int = 5) -> Path:
    splits = [
        name
        for name, count in zip(("train", "val", "test"), counts, strict=True)
        for _ in range(count)
    ]
    if dataset == "coco":
        splits[0] = "restval"
    images = []
    for number, split in enumerate(splits):
        one = {"filename": f"p{number:02d}.jpg", "imgid": number, "split": split}
        if dataset == "coco":
            one |= {"filepath": "val2014", "cocoid": 1000 + number}
        one["sentences"] = [{"raw": f" text  {k} of\n{number} "} for k in range(each)]
        images.append(one)
    path.write_text(json.dumps({"dataset": dataset, "images": images}))
    return path


def write_shard(path: Path, keys: list[int], entries=None) -> Path:
    """Write a tar file of samples 00003.jpg, 00003.txt, …; `entries` changes a sample's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            files = {"jpg": jpeg(key), "txt": f"caption of sample {key}".encode()}
            for ending, data in (entries(key) if entries else files).items():
                info = tarfile.TarInfo(f"{key:05d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
