"""Where a data set's files lie, what they are called, and where the known ones come from."""

from __future__ import annotations

import os
from pathlib import Path

from lib.errors import InputError

SPLITS = ("train", "dev", "test")
IMAGE_FOLDERS = {"f30k": "flickr30k-images", "coco": "coco-images"}  # else NAME/images
IMAGE_SOURCES = {
    "f30k": "get them from https://www.kaggle.com/datasets/hsankesara/flickr-image-dataset "
    "or name their folder with --f30k_img_path",
    "coco": "get train2014.zip and val2014.zip from http://images.cocodataset.org/zips/ "
    "or name their folder with --coco_img_path",
    "scenes": "make demo draws them",
}
CAPTION_SOURCES = {
    "f30k": "copy the data/f30k folder of https://github.com/CrossmodalGroup/LAPS there",
    "coco": "copy the data/coco folder of https://github.com/CrossmodalGroup/LAPS there",
    "scenes": "make demo writes it",
}


def file_stem(dataset: str, split: str) -> str:
    """Return what the names of a split's files begin with: COCO's test split is testall."""
    return "testall" if (dataset, split) == ("coco", "test") else split


def image_folder(data_path: str | os.PathLike, dataset: str) -> Path:
    """Return where a data set's images lie unless a flag says otherwise."""
    return Path(data_path) / IMAGE_FOLDERS.get(dataset, f"{dataset}/images")


def dense_file(data_path: str | os.PathLike, dataset: str, split: str) -> Path:
    """Return the file of a split's dense texts."""
    return Path(data_path) / dataset / f"{dataset}_{file_stem(dataset, split)}.jsonl"


def caption_source(dataset: str) -> str:
    """Return the way out where caption files are missing."""
    made = f"python -m tools.prepare writes the files of {dataset} from your pictures and captions"
    return CAPTION_SOURCES.get(dataset, made)


def image_source(dataset: str) -> str:
    """Return the way out where images are missing."""
    return IMAGE_SOURCES.get(dataset, "put them there or name their folder with --image_path")


def describe_command(data_path: str | os.PathLike, dataset: str, split: str) -> str:
    """Return the command that writes a split's dense texts."""
    where = "" if Path(data_path) == Path("data") else f" --data_path {data_path}"
    return f"python -m tools.describe --dataset {dataset} --split {split}{where}"


def dense_way_out(data_path: str | os.PathLike, dataset: str, split: str) -> str:
    """Return the ways out where a split has no dense texts, or not all."""
    return (
        f"{describe_command(data_path, dataset, split)} writes them; or choose a split that has "
        "them (--val_split test), or do without (--dense_side none)"
    )


def dataset_folder(data_path: str | os.PathLike, dataset: str) -> Path:
    """Return the folder of a data set's captions; InputError, with what there is, where none is."""
    parent, name = os.path.split(os.path.normpath(dataset))
    if parent or name in ("", ".", ".."):
        raise InputError(
            f"--dataset {dataset}: give the name of a folder, and where it lies with --data_path: "
            f"--data_path {parent or data_path} --dataset {name}"
        )
    folder = Path(data_path) / dataset
    if not folder.is_dir():
        raise InputError(
            f"--dataset {dataset}: no folder {folder} (--data_path)"
            f"{_known(Path(data_path))}; {caption_source(dataset)}"
        )
    return folder


def _known(root: Path) -> str:
    """Return, for an error's sentence, the data sets that lie in `root`."""
    found = sorted(one.parent.name for one in root.glob("*/train_caps.txt"))
    return f", which has {', '.join(found[:5])}" if found else ""
