"""Files of a data set -> `Split`: images or regions, both forms of id lists, dense texts."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib.data.dense_texts import dense_records, first_three, read_dense, texts_in_order
from lib.data.layout import (
    caption_source,
    dataset_folder,
    dense_file,
    dense_way_out,
    file_stem,
    image_folder,
    image_source,
)
from lib.errors import InputError, InputWarning, as_input_error
from lib.files import check_file, load_json, text_lines

HELD_OUT = "held_out"  # training images that choose the checkpoint where dev can't
REGION_SOURCE = (
    "SCAN's features of f30k and coco are at "
    "https://www.kaggle.com/datasets/kuanghueilee/scan-features; --precomp 0 reads image files"
)


@dataclass(frozen=True)
class Regions:
    """Where the precomputed regions of a split's images lie; entry r belongs to image row r."""

    file: Path  # .npy, (images, R, F)
    rows: np.ndarray  # (N_images,) int64, the image's row in the file
    lengths: np.ndarray  # (N_images,) int64, its valid regions, 1 to R; padding comes last

    def taken(self, rows: np.ndarray) -> Regions:
        """Return the regions of some images, in that order."""
        return replace(self, rows=self.rows[rows], lengths=self.lengths[rows])


@dataclass(frozen=True)
class Split:
    """The captions and images of one split; an image's row is its place in `image_ids`."""

    dataset: str
    name: str
    captions: list[str]
    image_ids: list[str]  # in order of first appearance
    image_files: list[str]  # one path an image; empty where the images are not needed
    caption_image: np.ndarray  # (N_captions,) int64, row of each caption's image
    dense: list[str] | None = None  # one dense text an image
    regions: Regions | None = None  # in the place of image files

    def described(self) -> Split:
        """Return the split with each image's dense text as its one caption."""
        rows = np.arange(len(self.image_ids))
        return replace(self, captions=self.dense, caption_image=rows, dense=None)


def load_split(
    data_path: str | os.PathLike,
    dataset: str,
    split: str,
    image_path: str | os.PathLike | None = None,
    needs_dense: bool = False,
    check_images: bool = True,
) -> Split:
    """Return split `split` (train, dev or test) of the data set in folder `data_path`/`dataset`.

    The ids file has a line for each caption, or one for each image (caption j then belongs to line
    j // k). `needs_dense` asks for the dense texts; `check_images=False` is for a method that reads
    no pixels: then neither the images nor id_mapping.json need to be there. Raises InputError with
    the file and line, or both counts, where the files are missing, unreadable or disagree.
    """
    folder = dataset_folder(data_path, dataset)
    stem = file_stem(dataset, split)
    captions_file, ids_file = folder / f"{stem}_caps.txt", folder / f"{stem}_ids.txt"
    captions = _read_lines(captions_file, "caption", caption_source(dataset))
    lines = _read_lines(ids_file, "image id", caption_source(dataset))
    line_ids = _id_of_each_caption(lines, len(captions), ids_file, captions_file)
    image_ids = list(dict.fromkeys(line_ids))
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    names = _image_names(folder / "id_mapping.json", image_ids, dataset, required=check_images)
    root = Path(image_path or image_folder(data_path, dataset))
    files = [os.path.join(root, name) for name in names]
    if check_images:
        _check_images(root, files, dataset)
        warn_of_shared_files(files, folder / "id_mapping.json")
    dense = None
    if needs_dense:
        way_out = dense_way_out(data_path, dataset, split)
        dense = read_dense(dense_file(data_path, dataset, split), image_ids, names, way_out)
    rows = np.array([row_of[image_id] for image_id in line_ids], dtype=np.int64)
    return Split(dataset, split, captions, image_ids, files, rows, dense)


def load_region_split(
    data_path: str | os.PathLike,
    dataset: str,
    split: str,
    region_dim: int,
    needs_dense: bool = False,
) -> Split:
    """Return split `split` with precomputed regions of `region_dim` channels for images.

    `region_files` says which files are read; image r has the r-th of equally many captions, and
    the first `{split}_lens.npy`[r] of its regions are valid where there is such a file, else all.
    Of the features only the header is read. Raises InputError with the file where one is missing,
    unreadable or of another shape, or where two disagree.
    """
    captions_file, features_file = region_files(data_path, dataset, split)
    captions = _read_lines(captions_file, "caption", REGION_SOURCE)
    images, width, channels = _regions_shape(features_file)
    if channels != region_dim:
        raise InputError(
            f"{features_file} holds regions of {channels} channels, the model reads {region_dim}; "
            f"train with --region_dim {channels}"
        )
    if not images or len(captions) % images:
        raise InputError(
            f"{captions_file} has {len(captions)} captions but {features_file} has {images} "
            "images; each image must have equally many captions"
        )
    lengths_file = features_file.with_name(f"{file_stem(dataset, split)}_lens.npy")
    rows = np.arange(images)
    return Split(
        dataset=dataset,
        name=split,
        captions=captions,
        image_ids=[str(row) for row in rows],
        image_files=[],
        caption_image=rows.repeat(len(captions) // images),
        dense=_region_dense(data_path, dataset, split, images) if needs_dense else None,
        regions=Regions(features_file, rows, _region_lengths(lengths_file, images, width)),
    )


def region_files(data_path: str | os.PathLike, dataset: str, split: str) -> tuple[Path, Path]:
    """Return the captions and the features of a split, {dataset}_precomp/{split}_ims.npy."""
    folder, stem = Path(data_path) / f"{dataset}_precomp", file_stem(dataset, split)
    return folder / f"{stem}_caps.txt", folder / f"{stem}_ims.npy"


def region_dense_file(data_path: str | os.PathLike, dataset: str, split: str) -> Path:
    """Return the dense texts of a split with regions: beside them, or else in `dataset`'s folder.

    Either may be missing.
    """
    name = f"{dataset}_{file_stem(dataset, split)}.jsonl"
    beside = Path(data_path) / f"{dataset}_precomp" / name
    return beside if beside.exists() else Path(data_path) / dataset / name


def map_array(path: Path) -> np.memmap:
    """Return a .npy file as a memory-mapped array. Raises InputError where it is none."""
    check_file(path, REGION_SOURCE)
    with as_input_error(f"{path} is no whole .npy file of numbers"):
        return np.lib.format.open_memmap(path, mode="r")


def _regions_shape(path: Path) -> tuple[int, int, int]:
    features = map_array(path)
    if features.ndim != 3 or 0 in features.shape[1:] or features.dtype.kind != "f":
        raise InputError(
            f"{path} holds {features.dtype} of shape {features.shape}; region features are floats "
            "of shape (images, regions, channels)"
        )
    return features.shape


def _region_lengths(path: Path, images: int, width: int) -> np.ndarray:
    """Return the lengths that the file holds; the full width where there is no such file."""
    if not path.exists():
        return np.full(images, width)
    lengths = map_array(path)
    if lengths.shape != (images,) or lengths.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {lengths.dtype} of shape {lengths.shape}; there must be an integer for "
            f"each of the {images} images"
        )
    wrong = np.flatnonzero((lengths < 1) | (lengths > width))
    if len(wrong):
        raise InputError(
            f"{path}: row {wrong[0]} is {lengths[wrong[0]]}; each image has 1 to {width} regions"
        )
    return np.array(lengths, dtype=np.int64)


def _region_dense(data_path: str | os.PathLike, dataset: str, split: str, images: int) -> list[str]:
    path = region_dense_file(data_path, dataset, split)
    return texts_in_order(
        dense_records(path, dense_way_out(data_path, dataset, split)), path, images
    )


def first_images(split: Split, count: int) -> Split:
    """Return the first `count` images of a split with their captions; 0 stands for all.

    Raises InputError where the split has fewer.
    """
    images = len(split.image_ids)
    if count > images:
        raise InputError(
            f"the {split.name} split has {images} images, fewer than the {count} asked for"
        )
    return _subset(split, np.arange(images) < count, split.name) if count else split


def first_captions(split: Split, count: int) -> Split:
    """Return a split with the first `count` captions of each image alone; 0 stands for all."""
    if not count:
        return split
    order = np.argsort(split.caption_image, kind="stable")
    starts = np.searchsorted(split.caption_image[order], np.arange(len(split.image_ids)))
    place = np.empty(len(order), dtype=np.int64)  # of each caption among its image's
    place[order] = np.arange(len(order)) - starts[split.caption_image[order]]
    kept = np.flatnonzero(place < count)
    captions = [split.captions[index] for index in kept]
    return replace(split, captions=captions, caption_image=split.caption_image[kept])


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Return the split without `count` of its images, and those, evenly spread, as HELD_OUT.

    Raises InputError where nothing would be left to train on.
    """
    images = len(split.image_ids)
    if count >= images:
        raise InputError(f"the {split.name} split has {images} images, too few to hold {count} out")
    held = np.zeros(images, dtype=bool)
    held[np.linspace(0, images - 1, count).round().astype(int)] = True
    return _subset(split, ~held, split.name), _subset(split, held, HELD_OUT)


def _subset(split: Split, chosen: np.ndarray, name: str) -> Split:
    rows = np.flatnonzero(chosen)
    new_row = np.cumsum(chosen) - 1
    captions = np.flatnonzero(chosen[split.caption_image])

    def take(values: list[str]) -> list[str]:
        return [values[row] for row in rows] if values else values

    return Split(
        dataset=split.dataset,
        name=name,
        captions=[split.captions[index] for index in captions],
        image_ids=take(split.image_ids),
        image_files=take(split.image_files),
        caption_image=new_row[split.caption_image[captions]],
        dense=None if split.dense is None else take(split.dense),
        regions=None if split.regions is None else split.regions.taken(rows),
    )


def _read_lines(path: Path, what: str, hint: str) -> list[str]:
    lines = [line.strip() for line in text_lines(path, hint)]
    if not lines:
        raise InputError(f"{path} is empty; {hint}")
    if "" in lines:
        raise InputError(f"{path}:{lines.index('') + 1}: empty {what}; fill in or remove the line")
    return lines


def _id_of_each_caption(
    ids: list[str], captions: int, ids_file: Path, captions_file: Path
) -> list[str]:
    if len(ids) == captions:
        return ids
    if captions % len(ids):
        raise InputError(
            f"{captions_file} has {captions} captions but {ids_file} has {len(ids)} ids; there "
            "must be one id for each caption, or one for each image with equally many captions"
        )
    for line, (first, second) in enumerate(pairwise(ids), start=2):
        if first == second:  # a list of one id per caption that was cut off
            raise InputError(
                f"{ids_file}:{line}: id {second} repeats, so the list has an id for each caption, "
                f"but it has {len(ids)} ids and {captions_file} has {captions} captions"
            )
    per_image = captions // len(ids)
    return [image_id for image_id in ids for _ in range(per_image)]


def _image_names(path: Path, image_ids: list[str], dataset: str, required: bool) -> list[str]:
    if not required and not path.exists():
        return []
    mapping = load_json(path, caption_source(dataset))
    if not isinstance(mapping, dict):
        raise InputError(f"{path}: must map image ids to file names, as {{'25': 'name.jpg'}}")
    unknown = [one for one in image_ids if not isinstance(mapping.get(one), str)]
    if unknown:
        raise InputError(
            f"{path}: no file name for {len(unknown)} of {len(image_ids)} image ids "
            f"({first_three(unknown)}); add them to the mapping"
        )
    return [mapping[one] for one in image_ids]


def _check_images(root: Path, files: list[str], dataset: str) -> None:
    """Raise InputError unless all files are there; one listing a folder, not one look a file."""
    if not root.is_dir():
        raise InputError(f"no image folder {root}; {image_source(dataset)}")
    listing: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in listing:
            listing[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listing[folder]:
            missing.append(file)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} images are missing ({first_three(missing)}); "
            f"{image_source(dataset)}"
        )


def warn_of_shared_files(files: Sequence[str], source: Path) -> None:
    """Warn where several image ids have one file: an image is then taken for its own negative."""
    ids_of = Counter(files)
    several = [file for file, count in ids_of.items() if count > 1]
    if several:
        ids = sum(ids_of[file] for file in several)
        warnings.warn(
            f"{source}: {ids} of {len(files)} image ids share {len(several)} files "
            f"({first_three(several)}); an image that has several ids is its own negative",
            InputWarning,
            stacklevel=3,
        )


def warn_of_shared_images(split: Split, others: Iterable[str], other_name: str) -> None:
    """Warn where images of a split are among the image ids of another."""
    both = set(split.image_ids) & set(others)
    if both:
        warnings.warn(
            f"{len(both)} of {len(split.image_ids)} images of {split.name} are in {other_name} too "
            f"(image ids {first_three(sorted(both))}); what is measured on them is too good",
            InputWarning,
            stacklevel=2,
        )


def ids_in(data_path: str | os.PathLike, dataset: str, split: str) -> list[str]:
    """Return the image ids in a split's file, none where there is no such file."""
    path = Path(data_path) / dataset / f"{file_stem(dataset, split)}_ids.txt"
    return [line.strip() for line in text_lines(path, "")] if path.is_file() else []
