"""Similarity of images and captions, alone and with its backward pass, against the loop.

Without a flag of the grid (--method, --mode, --patches, --words, --batch) a chosen few rows are
measured, those with a bar among them; with one, all combinations of what is given. --full is the
whole grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from tools.benchmark.cases import (
    MODES,
    Case,
    call_of,
    fewer_captions,
    least_work,
    loop_memory,
    prepare_call,
)
from tools.benchmark.loop import PEERS
from tools.benchmark.measure import (
    add_measuring,
    amp_of,
    check_at_least_one,
    chosen_list,
    cuda_peak,
    free_memory,
    positive_list,
    roofline,
    rss_peak,
    seconds_of,
    side_by_side,
    torch_device,
)
from tools.benchmark.report import judge

GRID = {
    "method": "laps,seps,seps_released",
    "mode": ",".join(MODES),
    "patches": "196,576,49",
    "words": "real,12,30,105",
    "batch": "16,64,128",
}
SHOWN_BY_DEFAULT = [  # method, mode, patches, words, batch
    ("laps", "eval", 196, None, 64),
    ("laps", "eval", 196, 12, 64),
    ("laps", "eval", 196, 88, 64),
    ("seps", "eval", 196, None, 64),
    ("seps_released", "eval", 196, None, 64),
    ("laps", "hardest", 196, None, 64),
    ("laps", "sum", 196, None, 64),
    ("laps", "eval", 576, None, 16),
    ("laps", "eval", 49, None, 64),
]
# method, mode, patches, words, device -> least ratio of speed, largest share of memory
BARS = {
    ("laps", "eval", 196, None, "cpu"): {"ratio": 10},
    ("laps", "eval", 196, 12, "cpu"): {"ratio": 10},
    ("laps", "eval", 196, 88, "cpu"): {"ratio": 6},
    ("seps", "eval", 196, None, "cpu"): {"ratio": 12},
    ("seps_released", "eval", 196, None, "cpu"): {"ratio": 12},
    ("laps", "hardest", 196, None, "cpu"): {"ratio": 8, "memory": 1 / 9},
    ("laps", "sum", 196, None, "cpu"): {"ratio": 6, "memory": 1 / 4},
    ("laps", "eval", 576, None, "cpu"): {"ratio": 6},
    ("laps", "eval", 196, None, "cuda"): {"ratio": 30},
    ("seps", "eval", 196, None, "cuda"): {"ratio": 30},
    ("laps", "hardest", 196, None, "cuda"): {"ratio": 5, "memory": 1 / 10},
    ("laps", "sum", 196, None, "cuda"): {"ratio": 3, "memory": 1 / 4},
}
BATCHES = {196: 64, 576: 16}  # at which the bars hold
USABLE = 0.7  # share of the free memory that the loop may fill


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the grid and of the measuring."""
    for flag, whole in GRID.items():
        parser.add_argument(f"--{flag}", default=None, help=f"of the grid, as in {whole}")
    parser.add_argument("--full", action="store_true", help="the whole grid: hours on a CPU")
    parser.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    parser.add_argument(
        "--captions",
        type=int,
        default=None,
        help="captions of an evaluation row; default: 256 on the CPU, 1024, as in eval.py, on CUDA",
    )
    parser.add_argument(
        "--loop_captions",
        type=int,
        default=None,
        help="the loop is timed on so many of them, since each costs it the same; default: 16 on "
        "the CPU, all on CUDA; training rows always take all",
    )
    add_measuring(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each case."""
    check_at_least_one(args, "repeats", "embed_size", "captions", "loop_captions")
    cases = chosen_cases(args)
    print(f"{len(cases)} rows, about {minutes_needed(cases, args):.0f} minutes", file=sys.stderr)
    rows = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        rows.append(measure_case(case, args))
    return rows


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases that the flags ask for. Raises InputError naming the flag."""
    cpu = torch_device(args.device).type == "cpu"
    captions = args.captions or (256 if cpu else 1024)
    if args.full or any(getattr(args, flag) is not None for flag in GRID):
        given = {flag: getattr(args, flag) or whole for flag, whole in GRID.items()}
        combinations = product(
            chosen_list(given["method"], "method", tuple(PEERS)),
            chosen_list(given["mode"], "mode", MODES),
            positive_list(given["patches"], "patches"),
            word_counts(given["words"]),
            positive_list(given["batch"], "batch"),
        )
    else:
        combinations = SHOWN_BY_DEFAULT
    return [
        Case(
            method=method,
            mode=mode,
            patches=patches,
            words=words,
            images=batch,
            captions=captions if mode == "eval" else batch,
            embed_size=args.embed_size,
            device=args.device,
            amp=amp_of(args),
            seed=args.seed,
        )
        for method, mode, patches, words, batch in combinations
    ]


def word_counts(text: str) -> list[int | None]:
    """Return the lengths that --words names, None for `real`."""
    parts = [part.strip() for part in text.split(",")]
    return [None if part == "real" else positive_list(part, "words")[0] for part in parts]


def loop_captions(case: Case, args: argparse.Namespace) -> int:
    """Return how many captions the loop is timed on."""
    if case.mode != "eval":
        return case.captions
    wanted = args.loop_captions or (16 if case.device == "cpu" else case.captions)
    return min(case.captions, wanted)


def minutes_needed(cases: list[Case], args: argparse.Namespace) -> float:
    """Return a guess from one caption of the loop for each kind of case."""
    known: dict[tuple, float] = {}
    seconds = 0.0
    for case in cases:
        kind = case.method, case.patches, case.images
        if kind not in known:
            probe = replace(case, mode="eval", captions=1)
            small, call = prepare_call(probe, "loop", 1)
            small()
            known[kind] = seconds_of(call, torch_device(case.device))
        passes = args.repeats + 1 + args.memory
        cost = known[kind] * loop_captions(case, args) * (1 if case.mode == "eval" else 3)
        share = case.captions / loop_captions(case, args) / 8  # ours, if 8 times as fast
        seconds += passes * cost * (1 + share) + 3
    return seconds / 60


# --- one row -------------------------------------------------------------------------------------


def measure_case(
    case: Case,
    args: argparse.Namespace,
    bar: Mapping[str, float] | None = None,
    with_loop: bool = True,
) -> dict[str, Any]:
    """Return the row of one case: pairs a second and added peak memory of both ways.

    It is judged by `bar`, where none is given by that of `BARS`.
    """
    device = torch_device(case.device)
    captions = loop_captions(case, args)
    fits = with_loop and loop_memory(case) < USABLE * free_memory(device)
    seconds = time_case(case, captions if fits else None, args.repeats, device, args.clock)
    row = {
        "name": case.name,
        "unit": "pairs/s",
        "ours": case.pairs / seconds["ours"],
        "loop": case.images * captions / seconds["loop"] if fits else None,
        "ours_pairs": case.pairs,
        "loop_pairs": case.images * captions if fits else 0,
        "mean_words": sum(case.lengths) / case.captions,
        "amp": case.amp,
        "clock": args.clock,
    }
    if args.roofline:
        row.update(roofline(least_work(case), seconds["ours"], device, case.amp, args.clock))
    if args.memory:
        row["ours_memory"] = peak_memory(case, "ours", case.captions, device)
        row["loop_memory"] = peak_memory(case, "loop", captions, device) if fits else None
    if not fits:
        row["note"] = f"loop not run: it needs about {loop_memory(case) / 2**30:.0f} GiB"
    return judge(row, bar_of(case, device) if bar is None else bar)


def time_case(
    case: Case, captions: int | None, repeats: int, device: torch.device, clock: str = "wall"
) -> dict[str, float]:
    """Return the median seconds of ours and, where `captions` says on how many, of the loop."""
    images, texts = case.image_tokens(), case.text_tokens()
    calls = {"ours": call_of(case, "ours", case.model(), images, texts)}
    if captions is not None:
        some = fewer_captions(texts, captions)
        calls = {"loop": call_of(case, "loop", case.model("loop"), images, some), **calls}
    return side_by_side(calls, repeats, device, clock)


def peak_memory(case: Case, way: str, captions: int, device: torch.device) -> int | None:
    """Return the bytes that one way needs beside its inputs; None where that can't be known."""
    if device.type == "cuda":
        return cuda_peak(prepare_call(case, way, captions)[1], device)
    return rss_peak(prepare_call, case, way, captions)


def bar_of(case: Case, device: torch.device) -> dict[str, float]:
    """Return what the case is to reach, empty where nothing was set."""
    if (case.images, case.embed_size) != (BATCHES.get(case.patches), 512):
        return {}
    return BARS.get((case.method, case.mode, case.patches, case.words, device.type), {})
