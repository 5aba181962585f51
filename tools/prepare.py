"""Bring pictures and captions into the layout that training reads: python -m tools.prepare.

One command a source: karpathy, folder, hf, webdataset. A command that was stopped goes on where it
was; nothing is overwritten without --overwrite 1; image files are linked or copied, never changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.data.layout import SPLITS
from lib.data.prepare.build import Options, Report, Target, build
from lib.data.prepare.captions import Columns
from lib.data.prepare.folder import read_folder
from lib.data.prepare.hub import extract_hub
from lib.data.prepare.karpathy import dataset_name, read_karpathy
from lib.data.prepare.photos import Source
from lib.data.prepare.shards import extract_shards
from lib.data.prepare.splitting import parse_plan
from lib.data.tars import expand_shards
from lib.errors import InputError
from lib.flags import Parser
from lib.program import program, run_program


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare as the flags say; return the exit code: 0, 2 (bad input), 130 (stopped)."""
    try:
        return prepare(parser().parse_args(argv))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    top = Parser("tools.prepare", description=__doc__)
    sources = top.add_subparsers(dest="source", required=True, metavar="SOURCE")
    karpathy = sources.add_parser("karpathy", help="dataset_flickr30k.json, dataset_coco.json")
    karpathy.add_argument("file", type=Path, help="one of Karpathy's dataset_*.json")
    karpathy.add_argument("--images", type=Path, default=None, help="folder to link images from")
    karpathy.add_argument("--check_counts", type=int, default=1, help="0: other counts are fine")
    folder = sources.add_parser("folder", help="pictures and a file of captions")
    folder.add_argument("folder", type=Path, help="folder of pictures, subfolders included")
    folder.add_argument("--captions", type=Path, required=True, help=".csv, .tsv, .jsonl or .txt")
    hub = sources.add_parser("hf", help="a Hugging Face data set: hub id or local folder")
    hub.add_argument("name", help="hub id, or folder of save_to_disk, imagefolder or parquet files")
    hub.add_argument("--config", default=None, help="configuration of the data set")
    shards = sources.add_parser("webdataset", help="tar files of samples")
    shards.add_argument("shards", help="pattern in quotes: 'shards-{000..010}.tar'")
    for one in (folder, hub):
        for column in ("image", "caption", "split"):
            one.add_argument(f"--{column}_column", default=None, help="default: guessed and said")
    for one in (karpathy, folder, hub, shards):
        _add_shared(one, near=None if one is karpathy else 6)
    return top


def _add_shared(parser: argparse.ArgumentParser, near: int | None) -> None:
    parser.add_argument("--dataset", default=None, metavar="NAME", help="folder to make")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="where it lies")
    parser.add_argument(
        "--split",
        default="0.8/0.1/0.1",
        help="shares of train/dev/test where the source has no splits, or three files that list "
        "images: train.txt,dev.txt,test.txt",
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn splits")
    parser.add_argument(
        "--near",
        type=_bits,
        default=near,
        metavar="BITS",
        help="bits of 64 that perceptual hashes of near-duplicates may differ in, off: don't look "
        f"(default: {'off' if near is None else near})",
    )
    parser.add_argument(
        "--link",
        choices=["symlink", "hardlink", "copy"],
        default="symlink",
        help="how image files come into the data set's folder",
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that hash images")
    parser.add_argument("--overwrite", type=int, default=0, help="1: write a data set anew")


def _bits(text: str) -> int | None:
    if text == "off":
        return None
    if not text.isdigit() or int(text) > 16:
        raise argparse.ArgumentTypeError("give a number from 0 to 16, or off")
    return int(text)


def prepare(args: argparse.Namespace) -> int:
    """Build the data set; return 0."""
    dataset = _dataset(args)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: give a number of at least 1")
    target = Target(args.data_path, dataset, _settings(args))
    if not target.open(bool(args.overwrite)):
        print(f"{target.folder} is finished already; --overwrite 1 writes it anew")
        return 0
    options = Options(
        plan=parse_plan(args.split),
        seed=args.seed,
        near=args.near,
        link=args.link,
        workers=args.workers,
        overwrite=bool(args.overwrite),
    )
    bars = Bars()
    try:
        report = build(target, _read(args, target, bars), options, bars)
    finally:
        bars.close()
    show(target, report)
    return 0


def _dataset(args: argparse.Namespace) -> str:
    name = args.dataset
    if name is None and args.source == "karpathy":
        name = dataset_name(args.file)
    if name is None:
        raise InputError("give the new data set a name with --dataset NAME")
    if name == "scenes" or name in (".", "..") or set(name) & set("/\\ ") or not name:
        raise InputError(f"--dataset {name}: choose a plain name, without / or space, not scenes")
    return name


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the data set depends on; the same again means that a stopped call goes on."""
    skipped = {"overwrite", "workers", "data_path", "dataset"}
    settings = {k: v for k, v in vars(args).items() if k not in skipped}
    inputs = [getattr(args, "file", None), getattr(args, "captions", None)]
    inputs += list(parse_plan(args.split).lists)
    if args.source == "webdataset":
        inputs += [Path(path) for path in expand_shards(args.shards)]
    stamps = [_stamp(path) for path in inputs if path is not None]
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()} | {
        "inputs": stamps
    }


def _stamp(path: Path) -> list:
    try:
        status = path.stat()
    except OSError:
        raise InputError(f"no file {path}") from None
    return [path.name, status.st_size, status.st_mtime_ns]


def _read(args: argparse.Namespace, target: Target, bars: Bars) -> Source:
    if args.source == "karpathy":
        return read_karpathy(args.file, args.images, bool(args.check_counts))
    if args.source == "webdataset":
        step = bars.stage("samples")
        return extract_shards(args.shards, target.images, target.journal(), step)
    columns = Columns(args.image_column, args.caption_column, args.split_column)
    if args.source == "folder":
        return read_folder(args.folder, args.captions, columns)
    step = bars.stage("rows")
    return extract_hub(args.name, args.config, columns, target.images, target.journal(), step)


class Bars:
    """One progress bar after another, a stage each."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show `done` more of `total` (0: unknown) at stage `what`."""
        if self.bar is None or self.bar.desc.rstrip(": ") != what:
            self.close()
            self.bar = tqdm(desc=what, total=total or None, leave=False, ncols=80)
        self.bar.update(done)

    def stage(self, what: str):
        """Return what counts a stage of unknown length."""
        return lambda done: self(what, done, 0)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def show(target: Target, report: Report) -> None:
    """Print what was built and what comes next."""
    for note in report.notes:
        print(note)
    for split in SPLITS:
        images, captions = report.counts.get(split, (0, 0))
        print(f"{split:5}  {images:>7,} images  {captions:>8,} captions")
    name, where = target.dataset, ""
    if str(target.data_path) != "data":
        where = f" --data_path {target.data_path}"
    splits = ",".join(report.counts)
    print(f"written to {target.folder}; next:")
    print(f"  python -m tools.check_data --dataset {name}{where}")
    print(f"  python -m tools.describe --dataset {name}{where} --split {splits}")
    print(f"  python train.py --dataset {name}{where} --logger_name runs/{name}_seps")


if __name__ == "__main__":
    run_program(main)
