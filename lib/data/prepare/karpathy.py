"""Karpathy's dataset_flickr8k|flickr30k|coco.json -> photos with the field's splits and ids."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lib.data.prepare.photos import Photo, Source, canonical_split, clean_caption
from lib.errors import InputError

NAMES = {"flickr8k": "f8k", "flickr30k": "f30k", "coco": "coco"}
COUNTS = {  # images of train, dev, test
    "f8k": (6000, 1000, 1000),
    "f30k": (29000, 1014, 1000),
    "coco": (113287, 5000, 5000),
}
CAPTIONS = 5  # that the published caption files keep of an image; some in COCO have more


def dataset_name(path: Path) -> str:
    """Return f8k, f30k or coco: what the file holds, by its "dataset" entry."""
    told = _read(path).get("dataset")
    if told not in NAMES:
        raise InputError(f'{path}: "dataset" is {told!r}, known are {", ".join(NAMES)}')
    return NAMES[told]


def read_karpathy(path: Path, images: Path | None = None, check_counts: bool = True) -> Source:
    """Return all photos; their files are sought in `images`, or lie in their place already.

    COCO's restval images are training images. Ids are those of the published caption files: cocoid
    for COCO, else imgid. Raises InputError for a file of another kind, or, with `check_counts`, for
    other numbers of images than the known ones.
    """
    dataset = dataset_name(path)
    photos, cut = [], 0
    for number, image in enumerate(_read(path)["images"]):
        photo = _photo(image, dataset, f"{path}: image {number}")
        cut += len(photo.captions) > CAPTIONS
        photo.captions = photo.captions[:CAPTIONS]
        photo.file = None if images is None else images / photo.name
        photos.append(photo)
    if check_counts:
        _check_counts(path, dataset, photos)
    notes = [f"{path.name}: the splits of {dataset}, {len(photos)} images"]
    if cut:
        notes.append(f"{cut} images have more than {CAPTIONS} captions: the first {CAPTIONS} stay")
    return Source(photos, notes)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}); it is in caption_datasets.zip of "
            "https://cs.stanford.edu/people/karpathy/deepimagesent/"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON, or cut off ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        raise InputError(f'{path}: no list "images", so it is none of Karpathy\'s dataset_*.json')
    return found


def _photo(image: Any, dataset: str, where: str) -> Photo:
    try:
        name = image["filename"]
        if image.get("filepath"):
            name = f"{image['filepath']}/{name}"
        captions = [clean_caption(one["raw"]) for one in image["sentences"]]
        image_id = str(image["cocoid" if dataset == "coco" else "imgid"])
        split = canonical_split(image["split"], where)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} lacks {error}") from None
    return Photo(name, [one for one in captions if one], split, image_id)


def _check_counts(path: Path, dataset: str, photos: list[Photo]) -> None:
    counts = Counter(photo.split for photo in photos)
    found = tuple(counts[split] for split in ("train", "dev", "test"))
    if found != COUNTS[dataset]:
        raise InputError(
            f"{path} has {'/'.join(map(str, found))} images in train/dev/test, {dataset} is known "
            f"to have {'/'.join(map(str, COUNTS[dataset]))}: the file is cut or changed; "
            "--check_counts 0 takes it as it is"
        )
