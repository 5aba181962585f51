"""Evaluate checkpoints: python eval.py --dataset f30k --data_path data/; see README.md."""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, which takes seconds
    from lib.program import prepare_terminal

    prepare_terminal()

import os

# read when torch loads: OpenMP threads that spin for long slow a busy CPU many times down
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from arguments import parse_eval, process_settings
from lib import distributed
from lib.checkpoints.checkpoint import BEST
from lib.errors import InputError, NonFiniteError
from lib.program import program, run_program
from lib.rendezvous import peers_told
from scoring import evaluate_checkpoint, evaluate_ensemble, member_checkpoint
from sharding import evaluate_in_shards


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; return the exit code, as `program` says."""
    args = parse_eval(argv)
    with peers_told():
        device = distributed.start_processes(**process_settings(args))
        if args.ensemble:
            members = [member_checkpoint(path) for path in args.ensemble]
            evaluate_ensemble(members, args, device)
            code = 0
        else:
            code = evaluate_all(find_checkpoints(args), args, device)
    distributed.stop()
    return code


def evaluate_all(
    checkpoints: Sequence[Path], args: argparse.Namespace, device: torch.device
) -> int:
    """Evaluate each checkpoint; return 0, or 2 or 3 (the worst) where one could not be.

    A checkpoint that can't be evaluated is told and does not keep the others from it.
    """
    codes = []
    evaluate = evaluate_in_shards if args.shards else evaluate_checkpoint
    may_idle = ("feature_cache",) if len(checkpoints) > 1 else ()  # it changes no number's meaning
    for checkpoint in checkpoints:
        try:
            evaluate(checkpoint, args, device, may_idle)
        except (InputError, OSError, NonFiniteError) as error:
            if distributed.is_main():
                print(f"error: {error}", file=sys.stderr)
            codes.append(3 if isinstance(error, NonFiniteError) else 2)
    if codes and len(checkpoints) > 1 and distributed.is_main():
        told = f"{len(codes)} of {len(checkpoints)} runs could not be evaluated"
        print(f"error: {told}, see above", file=sys.stderr)
    return max(codes, default=0)


def find_checkpoints(args: argparse.Namespace) -> list[Path]:
    """Return --checkpoint, or the best one of every run folder of the data set.

    Raises InputError where there is none, or a flag names one place for the output of several.
    """
    if args.checkpoint:
        return [Path(args.checkpoint)]
    dataset = args.dataset or "f30k"
    runs = Path(args.runs)
    nested = runs.glob(f"{dataset}/**/{BEST}")  # D2S-VSE's runs/f30k/vit_224/distill
    found = sorted({*runs.glob(f"{dataset}_*/{BEST}"), *nested})
    if not found:
        raise InputError(
            f"no {args.runs}/{dataset}_*/{BEST}, and none below {args.runs}/{dataset}: train a "
            "model first, or name a --checkpoint"
        )
    for flag in ("save_similarity", "analyse", "shards"):
        if getattr(args, flag) and len(found) > 1:
            raise InputError(
                f"--{flag} {getattr(args, flag)}: one place for {len(found)} runs; name one with "
                "--checkpoint"
            )
    return found


if __name__ == "__main__":
    run_program(main)
