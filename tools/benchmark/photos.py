"""A folder of photos and a trained model: indexing against the encoder alone, then queries.

The encoder is timed on decoded photos before and after the index is made, at its batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lib.batch import Batch
from lib.errors import InputError
from lib.files import text_lines
from lib.retrieval.index import Part, PictureIndex, find_pictures
from lib.retrieval.records import STORES
from lib.retrieval.search import Searcher
from lib.retrieval.shortlist import saved_shortlist
from tools import search as program
from tools.benchmark.measure import CLOCKS, check_at_least_one, seconds_of
from tools.benchmark.report import judge
from tools.benchmark.search import kept_share, timed, told
from tools.opened import Opened, add_checkpoint_flags, open_from_flags

BARS = {"index": {"ratio": 0.9}, "query": {"seconds": 0.15}}
TIMED = 256  # photos that the encoder alone is given, before and again after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the photos, the model and the queries."""
    parser.add_argument("--folder", required=True, help="photos, as tools.search index reads them")
    parser.add_argument("--captions", required=True, metavar="FILE", help="queries, one a line")
    parser.add_argument("--fitted_to", default=None, metavar="FILE", help="the shortlist; a line")
    parser.add_argument("--queries", type=int, default=50, help="drawn from the captions")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode photos")
    parser.add_argument("--store", default="float16", choices=STORES, help="of patch features")
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS), help="of the verdict")
    add_checkpoint_flags(parser, device=False)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for the index and one for the queries."""
    check_at_least_one(args, "queries", "batch_size")
    lines = [one.strip() for one in text_lines(Path(args.captions), "give a caption a line")]
    texts = random.Random(0).sample([one for one in lines if one], min(args.queries, len(lines)))
    opened = open_from_flags(args)
    with contextlib.redirect_stdout(sys.stderr):
        program.prepare_dense(opened, None)
    with tempfile.TemporaryDirectory(prefix="photo-index-") as folder:
        out = Path(folder) / "index"
        indexing = index_row(opened, out, args)
        return [indexing, query_row(opened, PictureIndex.open(out), texts, args)]


def index_row(opened: Opened, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return how fast photos are indexed, and how fast the encoder alone would be."""
    batches = decoded(opened, args)
    count = sum(len(batch.pixels) for batch in batches)
    seconds = encoder_seconds(opened, batches)
    ours, fitting, number = index_seconds(opened, out, args)
    seconds = [seconds, encoder_seconds(opened, batches)]
    row = {
        "name": f"index {number} photos",
        "unit": "images/s",
        "loop": count / statistics.mean(seconds),
        "ours": number / ours,
        "seconds": ours,
    }
    note = (
        f"loop: the image encoder alone on {count} decoded photos, {count / seconds[0]:.1f} "
        f"images/s before and {count / seconds[1]:.1f} after; shortlist built and fitted in "
        f"{fitting:.1f} s more"
    )
    return dict(judge(row, BARS["index"]), note=note)


def decoded(opened: Opened, args: argparse.Namespace) -> list[Batch]:
    """Return the first photos in batches, read, on the device."""
    files = [str(Path(args.folder) / one) for one in list(find_pictures(Path(args.folder)))[:TIMED]]
    read = opened.photos(files, None, args.batch_size)
    found = [batch.to(opened.device) for batch, _, _ in read if batch]
    if not found:
        raise InputError(f"--folder {args.folder} holds no photos that can be decoded")
    return found


def encoder_seconds(opened: Opened, batches: list[Batch]) -> float:
    """Return how long the image encoder takes for all batches."""

    @torch.inference_mode()
    def encode() -> None:
        for batch in batches:
            opened.model.image_encoder(batch.pixels)

    opened.model.image_encoder(batches[0].pixels[:2])
    return seconds_of(encode, opened.device)


def index_seconds(opened: Opened, out: Path, args: argparse.Namespace) -> tuple[float, float, int]:
    """Return the seconds of reading all photos into an index, and of its shortlist; how many."""
    flags = ["index", args.folder, "--checkpoint", args.checkpoint, "--out", str(out)]
    flags += ["--batch_size", str(args.batch_size), "--workers", str(args.workers)]
    flags += ["--captions", args.fitted_to] if args.fitted_to else []
    settings = program.parser().parse_args(flags)
    folder = Path(args.folder).resolve()
    index = PictureIndex.create(out, program.manifest(opened, folder, args.store))
    plan = index.plan(find_pictures(folder), Part())
    with contextlib.redirect_stdout(sys.stderr):
        started = time.perf_counter()
        program.read_pictures(opened, index, plan, Part(), None, settings)
        read = time.perf_counter()
        program.finish(index, opened, settings)
    return read - started, time.perf_counter() - read, len(index)


def query_row(
    opened: Opened, index: PictureIndex, texts: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Return how long queries take over the index."""
    searcher = Searcher(opened.model, index, saved_shortlist(index), opened.blank(), opened.device)
    batches = [opened.captions([text]) for text in texts]
    row = {
        "name": f"query over {len(index)} photos",
        "unit": "s",
        **timed(searcher, batches, args.clock),
        "kept": kept_share(searcher, batches, len(index)),
    }
    note = f"{len(batches)} captions; {told(row)}, all {len(index)} scored exactly"
    return dict(judge(row, BARS["query"]), note=note)
