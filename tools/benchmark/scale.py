"""How time and memory grow with the work: evaluation, an epoch, a batch; exponents are fitted.

Features are made, small by default, so that growth and not size is measured. Of an evaluation with
N images and 5 N captions the pairs grow as N², of an epoch of batches as N, of a step as B²: what
grows faster is told.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lib.model.precision import autocast_for
from lib.retrieval.metrics import recall_metrics
from lib.retrieval.similarity import similarity_matrix
from tools.benchmark.cases import CAPTIONS_PER_IMAGE, Case, call_of, read_texts
from tools.benchmark.loop import PEERS
from tools.benchmark.measure import (
    CLOCKS,
    check_at_least_one,
    chosen_one,
    cuda_peak,
    positive_list,
    rss_peak,
    seconds_of,
    torch_device,
)

TOLERANCE = 0.15  # of an exponent, for what a clock and small sizes add
BATCH = 64  # of images in evaluation, and of an epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sizes."""
    parser.add_argument("--method", default="laps", help="what is scored")
    parser.add_argument("--images", default="1000,2000,4000,8000", help="of evaluation and epoch")
    parser.add_argument("--batches", default="16,32,64,128,256,512", help="pairs of a step")
    parser.add_argument("--patches", type=int, default=16, help="of an image")
    parser.add_argument("--embed_size", type=int, default=32, help="width C of the joint space")
    parser.add_argument("--mode", default="hardest", choices=["hardest", "sum"], help="of a step")
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS), help="what counts")
    parser.add_argument("--memory", type=int, default=1, help="0: peak memory is not measured")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and lengths")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each size, and one with the fitted exponents for each kind of work."""
    check_at_least_one(args, "patches", "embed_size")
    method = chosen_one(args.method, "method", tuple(PEERS))
    images, batches = positive_list(args.images, "images"), positive_list(args.batches, "batches")
    case = Case(
        method, args.mode, args.patches, None, 1, 1, args.embed_size, args.device, seed=args.seed
    )
    rows = []
    for kind, prepare, sizes, most in (
        ("evaluation", prepare_evaluation, images, 2),
        ("epoch", prepare_epoch, images, 1),
        ("step", prepare_step, batches, 2),
    ):
        found = [measure(kind, prepare, replace(case, images=size), args) for size in sizes]
        rows += [*found, growth(kind, sizes, found, most)]
    return rows


def measure(kind: str, prepare: Callable, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one size: seconds, and peak memory added."""
    print(f"{kind} of {case.images}", file=sys.stderr, flush=True)
    device = torch_device(args.device)
    small, call = prepare(case)
    small()
    row = {"name": f"{kind} {case.images}", "unit": "s"}
    row["ours"] = seconds_of(call, device, args.clock)
    if args.memory:
        peak = cuda_peak(call, device) if device.type == "cuda" else rss_peak(prepare, case)
        row["ours_memory"] = peak
    return row


def growth(
    kind: str, sizes: Sequence[int], rows: Sequence[dict[str, Any]], most: float
) -> dict[str, Any]:
    """Return the row that tells the exponents of time and memory; `most` is that of the pairs."""
    found = {
        "time": exponent(sizes, [row["ours"] for row in rows]),
        "memory": exponent(sizes, [row.get("ours_memory") for row in rows]),
    }
    told = ", ".join(
        f"{what} ~ n^{value:.2f}" for what, value in found.items() if value is not None
    )
    fits = all(value is None or value <= most + TOLERANCE for value in found.values())
    verdict = "no faster than the pairs" if fits else "FASTER than the pairs"
    return {
        "name": f"{kind} growth",
        "note": f"{told or 'one size alone'}; pairs ~ n^{most}: {verdict}",
        "exponents": found,
        "met": fits,
    }


def exponent(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Return the slope of log value over log size by least squares; None where it has none."""
    pairs = [
        (math.log(size), math.log(value))
        for size, value in zip(sizes, values, strict=True)
        if value
    ]
    if len({size for size, _ in pairs}) < 2:
        return None
    return float(np.polyfit(*zip(*pairs, strict=True), 1)[0])


# --- the work ------------------------------------------------------------------------------------


def prepare_evaluation(case: Case) -> tuple[Callable, Callable]:
    """Return the evaluation of a few images, and that of all with five captions each."""
    return evaluation(replace(case, images=4)), evaluation(case)


def evaluation(case: Case) -> Callable[[], dict]:
    """Return the scoring and ranking of `images` images with five captions each."""
    case = replace(case, mode="eval", captions=CAPTIONS_PER_IMAGE * case.images)
    model = case.model()
    images, texts = case.image_tokens(), read_texts(model, case.text_tokens())
    autocast = autocast_for(case.amp, torch.device(case.device))

    def evaluate() -> dict:
        parts = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
        return recall_metrics(similarity_matrix(model, parts, [texts], autocast, len(images)))

    return evaluate


def prepare_epoch(case: Case) -> tuple[Callable, Callable]:
    """Return a step of a few pairs, and an epoch of batches over frozen features."""
    batch = min(BATCH, case.images)
    small, step = prepare_step(replace(case, images=batch))

    def epoch() -> None:
        for _ in range(-(-case.images // batch)):
            step()

    return small, epoch


def prepare_step(case: Case) -> tuple[Callable, Callable]:
    """Return the similarity, loss and backward pass of a few pairs, and of `images`."""
    calls = []
    for size in (4, case.images):
        sized = replace(case, images=size, captions=size)
        tokens = sized.image_tokens(), sized.text_tokens()
        calls.append(call_of(sized, "ours", sized.model(), *tokens))
    return tuple(calls)
