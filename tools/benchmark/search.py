"""A query over an index of made pictures: its time and where it goes, memory, what it finds.

Above 2,048 entries records are hard links to those of 2,048 (made_index.py): they lie in the
system's cache unless the row says cold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lib.batch import Batch
from lib.errors import InputError
from lib.methods.base import Method
from lib.retrieval.index import PictureIndex
from lib.retrieval.records import STORES
from lib.retrieval.search import RERANKED_AT_ONCE, SHORTLIST, Searcher
from lib.retrieval.shortlist import KINDS, build_shortlist, choose_kind, saved_shortlist
from tools.benchmark.loop import PEERS
from tools.benchmark.made_index import CPU, Made, forget_files, make_index
from tools.benchmark.measure import (
    CLOCKS,
    check_at_least_one,
    chosen_list,
    chosen_one,
    positive_list,
    rss_peak,
    seconds_of,
    torch_device,
)
from tools.benchmark.report import judge

BARS = {1000: {"seconds": 0.15}, 100_000: {"seconds": 0.3, "gigabytes": 2}}
FITTED_TO = 192  # captions, as tools.search
FIRST_FITTED = 10_000  # their numbers: those of queries begin at 0
TOP, CHECKED, OTHERS = 10, 5, 1000  # queries whose shortlist is checked, and against how many
COLD = 3  # queries without the system's cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sizes."""
    parser.add_argument("--method", default="laps", help="what is searched with")
    parser.add_argument("--entries", default="1000,100000", help="pictures of an index")
    parser.add_argument("--stores", default="float16,int8", help="of patch features")
    parser.add_argument(
        "--kinds", default="auto", help=f"of shortlist, several of {','.join(KINDS)}"
    )
    parser.add_argument("--encoders", default="base", choices=["base", "tiny"], help="size")
    parser.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    parser.add_argument("--queries", type=int, default=20, help="the median of so many")
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS), help="of the verdict")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and captions")
    parser.add_argument("--memory", type=int, default=1, help="0: peak memory is not measured")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of entries, store and kind of shortlist."""
    check_at_least_one(args, "queries", "embed_size")
    if torch_device(args.device).type != "cpu":
        raise InputError(
            f"--device {args.device}: made indices are searched on the CPU; leave it out"
        )
    method = chosen_one(args.method, "method", tuple(PEERS))
    stores, kinds = chosen_list(args.stores, "stores", STORES), args.kinds
    rows = []
    for entries in positive_list(args.entries, "entries"):
        for store in stores:
            made = Made(method, store, entries, args.encoders, args.embed_size, args.seed)
            with tempfile.TemporaryDirectory(prefix="made-index-") as folder:
                model = made.model()
                index = make_index(Path(folder) / "index", made, model)
                for kind in chosen_list(kinds, "kinds", KINDS):
                    _tell(f"{entries} entries, {store}, {choose_kind(kind, entries)}")
                    rows.append(measure(made, model, index, kind, args))
    return rows


def measure(
    made: Made, model: Method, index: PictureIndex, kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the row of one index."""
    kind = choose_kind(kind, len(index))
    searcher = Searcher(model, index, saved_shortlist(index, kind), made.blank(), CPU)
    searcher.fit(made.caption(*range(FIRST_FITTED, FIRST_FITTED + FITTED_TO)))
    batches = [made.caption(number) for number in range(args.queries)]
    row = {
        "name": f"{made.method} {len(index)} {made.store} {kind}",
        "unit": "s",
        **timed(searcher, batches, args.clock),
        "kept": kept_share(searcher, batches[:CHECKED], OTHERS),
        "found": found_share(searcher, batches) if kind != "flat" else None,
        "cold": cold_seconds(searcher, batches),
    }
    if args.memory:
        del searcher
        row["ours_memory"] = rss_peak(prepare_queries, made, index.folder, kind, added=False)
    bar = dict(BARS.get(len(index), {}))
    return dict(judge(row, bar), note=told(row))


def told(row: dict[str, Any]) -> str:
    """Return in words what the row holds beside its time."""
    parts = ", ".join(f"{name} {1000 * value:.0f}" for name, value in row["parts"].items())
    words = [
        f"wall {1000 * row['wall']:.0f} ms, worst {1000 * row['worst']:.0f}, CPU "
        f"{1000 * row['cpu']:.0f}; ms of CPU: {parts}",
        f"the shortlist kept {100 * row['kept']:.0f}% of the exact top {TOP}",
    ]
    if row.get("found") is not None:
        words.append(f"it holds {100 * row['found']:.0f}% of a flat one's")
    if row.get("cold") is not None:
        words.append(f"{1000 * row['cold']:.0f} ms with no record in the system's cache")
    return "; ".join(words)


# --- one searcher --------------------------------------------------------------------------------


def timed(searcher: Searcher, batches: list[Batch], clock: str = "wall") -> dict[str, Any]:
    """Return median seconds of queries by both clocks, the worst, and those of their parts.

    `seconds` are those by `clock`. What is loaded once is loaded before.
    """
    searcher.find(batches[0], TOP)
    wall, cpu = [], []
    for batch in batches:
        with taken(wall, "wall"), taken(cpu, "cpu"):
            searcher.find(batch, TOP)
    found = {"wall": statistics.median(wall), "worst": max(wall), "cpu": statistics.median(cpu)}
    parts = parts_of(searcher, batches)
    return {**found, "seconds": found[clock], "ours": found[clock], "parts": parts}


@contextmanager
def taken(seconds: list[float], clock: str) -> Iterator[None]:
    """Add the seconds that the block takes."""
    started = CLOCKS[clock]()
    yield
    seconds.append(CLOCKS[clock]() - started)


def parts_of(searcher: Searcher, batches: list[Batch]) -> dict[str, float]:
    """Return the median CPU seconds of a query's parts, each called alone."""
    seconds: dict[str, list[float]] = {"text": [], "shortlist": [], "reading": [], "scoring": []}
    for batch in batches:
        with taken(seconds["text"], "cpu"):
            texts, vector = searcher.encode_text(batch)
        with taken(seconds["shortlist"], "cpu"):
            pictures = searcher.nearest(vector, SHORTLIST)
        pictures = pictures[searcher.index.reading_order(pictures)]
        with taken(seconds["reading"], "cpu"):
            for first in range(0, len(pictures), RERANKED_AT_ONCE):
                searcher.images(pictures[first : first + RERANKED_AT_ONCE])
        with taken(seconds["scoring"], "cpu"):
            searcher.exact(pictures, texts)
        seconds["scoring"][-1] = max(0.0, seconds["scoring"][-1] - seconds["reading"][-1])
    return {name: statistics.median(found) for name, found in seconds.items()}


def kept_share(searcher: Searcher, batches: list[Batch], others: int) -> float:
    """Return which share of the exact top 10 the shortlist keeps, against so many others."""
    found = [searcher.kept(batch, TOP, others) for batch in batches]
    return sum(one.kept for one in found) / sum(one.top for one in found)


def found_share(searcher: Searcher, batches: list[Batch]) -> float:
    """Return which share of a flat shortlist the searcher's own holds."""
    flat = build_shortlist(searcher.index.vectors, "flat")
    queries = np.concatenate([searcher.encode_text(batch)[1] for batch in batches])
    pairs = zip(
        flat.search(queries, SHORTLIST), searcher.shortlist.search(queries, SHORTLIST), strict=True
    )
    return float(np.mean([len(np.intersect1d(exact, ours)) / len(exact) for exact, ours in pairs]))


def cold_seconds(searcher: Searcher, batches: list[Batch]) -> float | None:
    """Return median seconds of queries whose records come from the disk; None if none can."""
    seconds = []
    for batch in batches[:COLD]:
        if not forget_files(searcher.index):
            return None
        seconds.append(seconds_of(lambda batch=batch: searcher.find(batch, TOP), CPU))
    return statistics.median(seconds)


def prepare_queries(made: Made, folder: Path, kind: str) -> tuple[Callable, Callable]:
    """Return nothing to do, and: open the index, load the model, ask."""

    def ask() -> None:
        index = PictureIndex.open(folder)
        searcher = Searcher(made.model(), index, saved_shortlist(index, kind), made.blank(), CPU)
        for number in range(CHECKED):
            searcher.find(made.caption(number), TOP)

    return (lambda: None), ask


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
