"""A training step with the encoders in chunks (--cached_batch) and without, as the batch grows.

Small encoders with random weights by default, so that growth and not size is measured: what the
encoders remember grows with the batch in the ordinary step alone; tokens grow with it, and the
matrix of similarities with its square, in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lib.methods.base import Method
from lib.methods.registry import method_names
from lib.training.setup import encode_in_chunks
from tools.benchmark.measure import (
    CLOCKS,
    amp_of,
    check_at_least_one,
    chosen_list,
    cuda_peak,
    free_memory,
    positive_list,
    rss_peak,
    seconds_of,
    torch_device,
)
from tools.benchmark.step import StepCase, step_of

USABLE = 0.5  # share of the free memory that the ordinary step may fill
FEW = 8  # pairs of a step that is not measured


@dataclass(frozen=True)
class BatchCase(StepCase):
    """A training step whose encoders take at most `rows` pairs at once, 0: all."""

    rows: int = 0

    @property
    def side(self) -> int:
        return 224 if self.encoders == "base" else 64

    def model(self, way: str = "ours") -> Method:
        model = super().model(way)
        encode_in_chunks(model, self.rows)
        return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sizes."""
    parser.add_argument("--method", default="laps", help="one or several, laps,seps")
    parser.add_argument("--cached_batch", type=int, default=64, help="pairs of a chunk")
    parser.add_argument("--batches", default="64,256,1024,4096", help="pairs of a step")
    parser.add_argument("--mode", default="hardest", choices=["hardest", "sum"], help="negatives")
    parser.add_argument("--encoders", default="tiny", choices=["base", "tiny"], help="size")
    parser.add_argument("--embed_size", type=int, default=64, help="width C of the joint space")
    parser.add_argument(
        "--amp", default=None, choices=["off", "bf16"], help="default: off on the CPU, else bf16"
    )
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS), help="what counts")
    parser.add_argument("--memory", type=int, default=1, help="0: peak memory is not measured")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pixels and words")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and batch."""
    check_at_least_one(args, "embed_size", "cached_batch")
    batches = sorted(positive_list(args.batches, "batches"))
    for method in chosen_list(args.method, "method", tuple(method_names())):
        row = None
        for batch in batches:
            case = BatchCase(
                method,
                args.mode,
                batch,
                encoders=args.encoders,
                embed_size=args.embed_size,
                device=args.device,
                amp=amp_of(args),
                seed=args.seed,
            )
            row = measure(case, args, row)
            yield row


def measure(
    case: BatchCase, args: argparse.Namespace, smaller: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the row of one batch; the ordinary step only where it should fit, by the `smaller`."""
    device = torch_device(case.device)
    row: dict[str, Any] = {"name": f"{case.method} {case.mode} batch {case.batch}"}
    row |= {"batch": case.batch, "kept_bytes": kept_bytes(case)}
    ways = {"cached": replace(case, rows=args.cached_batch), "ordinary": case}
    if not ordinary_fits(case, smaller, device):
        ways.pop("ordinary")
        row["note"] = "the ordinary step would not fit the memory"
    for way, one in ways.items():
        print(f"{row['name']}, {way}", file=sys.stderr, flush=True)
        small, step = prepare_step(one)
        small()
        row[f"{way}_ms"] = 1000 * seconds_of(step, device, args.clock) / case.batch
        if args.memory:
            on_cuda = device.type == "cuda"
            row[f"{way}_memory"] = (
                cuda_peak(step, device) if on_cuda else rss_peak(prepare_step, one)
            )
        del small, step
    return row


def ordinary_fits(case: BatchCase, smaller: dict[str, Any] | None, device: torch.device) -> bool:
    """Return whether the ordinary step should fit the free memory, by that of a smaller batch."""
    if smaller is None:
        return True
    taken = smaller.get("ordinary_memory", 0)  # left out there: it does not fit here either
    if taken is None or "ordinary_ms" not in smaller:
        return False
    return taken * case.batch / smaller["batch"] < USABLE * free_memory(device)


def prepare_step(case: BatchCase) -> tuple[Callable, Callable]:
    """Return a step of a few pairs and the case's own, with one model."""
    model = case.model()
    few = replace(case, batch=min(FEW, case.batch))
    return step_of(few, "ours", model), step_of(case, "ours", model)


def kept_bytes(case: BatchCase) -> dict[str, int]:
    """Return what any step keeps: features of all patches and words, and the similarities."""
    model, batch = case.model(), case.inputs()
    tokens = len(batch.ids) * batch.ids.shape[1]
    if model.image_encoder is not None:
        tokens += case.batch * model.image_encoder.layout.num_tokens
    if model.dense_owner is not None:
        tokens += batch.dense_ids.numel()
    return {"tokens": 4 * tokens * case.embed_size, "matrix": 4 * case.batch**2}
