"""Draw what a model sees: patches kept, their significance, words: python -m tools.visualize."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data import prepare_scenes, read_split
from lib.data.images import decode
from lib.data.splits import Split
from lib.errors import InputError
from lib.files import check_destination
from lib.flags import Parser
from lib.program import program, run_program
from lib.retrieval.evidence import Evidence, gather_evidence
from lib.retrieval.sheets import captions_sheet, pair_sheet
from tools.opened import (
    Opened,
    add_checkpoint_flags,
    data_settings,
    open_from_flags,
    without_dense_text,
)


@dataclass(frozen=True)
class Shown:
    """A photo to draw: its file, its captions, its dense text, and what its pictures are named."""

    name: str
    file: str
    captions: list[str]
    dense: str | None = None


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Write a PNG a pair, and one with all captions of an image; return the exit code."""
    args = parser().parse_args(argv)
    check_destination(Path(args.out) / "a.png", "--out", make_folder=True)
    opened = open_from_flags(args)
    for shown in chosen(args, opened):
        for path in draw(shown, opened, Path(args.out)):
            print(f"written to {path}")
    return 0


def parser() -> Parser:
    """Return the parser of the command line."""
    whole = Parser("tools.visualize", description=__doc__)
    add_checkpoint_flags(whole)
    data = whole.add_argument_group("images of a data set")
    data.add_argument("--dataset", default=None, help="default: the one the model was trained on")
    data.add_argument("--split", default="test", choices=["train", "dev", "test"], help="of it")
    data.add_argument("--image", nargs="+", default=None, metavar="ID", help="image ids")
    data.add_argument("--random", type=int, default=None, metavar="N", help="so many, at random")
    data.add_argument("--seed", type=int, default=0, help="of --random")
    data.add_argument("--captions", type=int, default=5, help="captions shown of each image")
    data.add_argument("--data_path", default=None, help="root folder of the data sets")
    data.add_argument("--image_path", default=None, metavar="DIR", help="image folder")
    data.add_argument("--f30k_img_path", default=None, help="as in train.py")
    data.add_argument("--coco_img_path", default=None, help="as in train.py")
    photo = whole.add_argument_group("a photo of your own")
    photo.add_argument("--image_file", default=None, metavar="FILE", help="any image file")
    photo.add_argument("--caption", nargs="+", default=None, metavar="TEXT", help="texts for it")
    photo.add_argument("--dense", default=None, metavar="TEXT", help="its dense text")
    whole.add_argument("--out", default="pictures", metavar="DIR", help="folder of the PNG files")
    whole.add_argument("--name", default=None, help="what they begin with; default: the image's id")
    return whole


def chosen(args: argparse.Namespace, opened: Opened) -> Iterator[Shown]:
    """Yield the photos that the flags name. Raises InputError where they contradict or miss."""
    if args.image_file:
        if args.image or args.random or not args.caption:
            raise InputError("--image_file FILE goes with --caption TEXT, and without --image")
        yield own_photo(args, opened)
        return
    if (args.image is None) == (args.random is None):
        raise InputError(
            "say what to draw: --image ID or --random N of a data set, or --image_file FILE "
            "--caption TEXT"
        )
    split = dataset_split(args, opened)
    for row in rows_of(args, split):
        captions = [split.captions[one] for one in np.flatnonzero(split.caption_image == row)]
        name = args.name or split.image_ids[row]
        dense = None if split.dense is None else split.dense[row]
        yield Shown(name, split.image_files[row], captions[: args.captions], dense)


def own_photo(args: argparse.Namespace, opened: Opened) -> Shown:
    """Return the photo of --image_file; without a dense text a model goes on without."""
    if opened.model.dense_owner is not None and args.dense is None:
        print(without_dense_text(opened, "this checkpoint reads a dense text, and none is given"))
    name = args.name or Path(args.image_file).stem
    return Shown(name, args.image_file, args.caption, args.dense)


def dataset_split(args: argparse.Namespace, opened: Opened) -> Split:
    """Return the split that is drawn from, read as the model was trained unless flags say else."""
    settings = data_settings(opened, args)
    prepare_scenes(settings)
    return read_split(settings, args.split, needs_dense=opened.model.dense_owner is not None)


def rows_of(args: argparse.Namespace, split: Split) -> list[int]:
    """Return the rows of the images asked for. Raises InputError for an id that is not there."""
    if args.random is not None:
        if not 1 <= args.random <= len(split.image_ids):
            raise InputError(f"--random {args.random}: give 1 to {len(split.image_ids)}")
        return random.Random(args.seed).sample(range(len(split.image_ids)), args.random)
    missing = [one for one in args.image if one not in split.image_ids]
    if missing:
        raise InputError(
            f"--image {missing[0]}: no such id in {args.split} of {split.dataset}, which has "
            f"{split.image_ids[0]} to {split.image_ids[-1]}"
        )
    return [split.image_ids.index(one) for one in args.image]


def draw(shown: Shown, opened: Opened, folder: Path) -> Iterator[Path]:
    """Write a photo's PNG files, and yield their paths."""
    evidences = evidence_of(shown, opened)
    if len(evidences) > 1:
        yield saved(captions_sheet(evidences), folder / f"{shown.name}_captions.png")
    for number, one in enumerate(evidences, start=1):
        yield saved(pair_sheet(one), folder / f"{shown.name}_{number}.png")


def saved(sheet, path: Path) -> Path:
    """Write a sheet; return its path."""
    sheet.save(path)
    return path


def evidence_of(shown: Shown, opened: Opened) -> list[Evidence]:
    """Return what the model sees in a photo for each of its captions."""
    image = opened.photo(shown.file, shown.dense)
    picture = cv2.cvtColor(decode(shown.file), cv2.COLOR_BGR2RGB)
    return gather_evidence(
        opened.model,
        image.to(opened.device),
        opened.captions(shown.captions, shown.dense).to(opened.device),
        picture,
        shown.captions,
        [opened.words(one) for one in shown.captions],
    )


if __name__ == "__main__":
    run_program(main)
