"""Flags of an evaluation: what is reported beside the field's recalls, and what is scored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lib.errors import InputError
from lib.flags import IntegerList
from lib.retrieval.coco_labels import check_installed


def add_result_flags(group: argparse._ArgumentGroup) -> None:
    """Add what train.py --eval 1 and eval.py report beside the field's recalls."""
    group.add_argument(
        "--evaluate_cxc", type=int, default=0, help="1: also against CxC's labels (coco)"
    )
    group.add_argument(
        "--evaluate_eccv", type=int, default=0, help="1: also against ECCV Caption's labels (coco)"
    )
    group.add_argument(
        "--recall_at",
        action=IntegerList,
        default=[1, 5, 10],
        help="K of further recalls; rSum stays that of 1, 5 and 10",
    )


def add_way_flags(group: argparse._ArgumentGroup) -> None:
    """Add eval.py's ways of scoring and of looking at the scores."""
    group.add_argument(
        "--ensemble",
        nargs="+",
        default=None,
        metavar="RUN",
        help="add the similarities of these run folders or checkpoints; results of their own",
    )
    group.add_argument(
        "--ensemble_weights",
        type=float,
        nargs="+",
        default=None,
        metavar="W",
        help="factors of the members' similarities in that order (all 1); choose them on dev",
    )
    group.add_argument(
        "--rerank",
        type=int,
        default=0,
        metavar="N",
        help="score only each query's N best by global embeddings (0: all); approximate",
    )
    group.add_argument(
        "--attention_kept",
        type=int,
        default=0,
        help="1: tell how much of the image encoder's own [CLS] attention lies on patches kept",
    )
    group.add_argument(
        "--shards",
        default=None,
        metavar="DIR",
        help="evaluate a large gallery in files there: the same command on any number of machines "
        "shares the work, goes on after a kill, and prints the table when all is done",
    )
    group.add_argument("--shard_images", type=int, default=512, help="images of a file of --shards")
    group.add_argument(
        "--analyse", default=None, metavar="DIR", help="write where the model fails there (CSV)"
    )


def check_evaluation(args: argparse.Namespace) -> None:
    """Raise InputError where eval.py's flags contradict each other."""
    if args.ensemble and len(args.ensemble) < 2:
        raise InputError("--ensemble: give at least two runs")
    check_weights(args.ensemble, args.ensemble_weights)
    for flag in ("checkpoint", "rerank", "attention_kept"):
        if args.ensemble and getattr(args, flag):
            raise InputError(f"--ensemble and --{flag} don't go together: leave one out")
    for flag in ("ensemble", "rerank"):
        if args.shards and getattr(args, flag):
            raise InputError(f"--shards and --{flag} don't go together: leave one out")
    for flag in ("analyse", "save_similarity", "evaluate_cxc", "evaluate_eccv"):
        if args.rerank and getattr(args, flag):
            raise InputError(f"--{flag} needs all similarities: leave out --rerank {args.rerank}")
        if args.shards and getattr(args, flag):
            raise InputError(
                f"--{flag} needs all similarities, and --shards keeps ranks alone: leave one out"
            )


def check_weights(members: Sequence[str] | None, weights: Sequence[float] | None) -> None:
    """Raise InputError where --ensemble_weights does not give each member a factor."""
    if weights is not None and len(weights) != len(members or ()):
        told = f"--ensemble names {len(members)} runs" if members else "there is no --ensemble"
        raise InputError(f"--ensemble_weights gives {len(weights)} factors, but {told}")


def check_labels(args: argparse.Namespace) -> None:
    """Raise InputError where the evaluation at the end of train.py could not use COCO's labels."""
    asked = [flag for flag in ("evaluate_cxc", "evaluate_eccv") if getattr(args, flag)]
    if not (args.eval and asked):
        return
    if args.dataset != "coco" or args.precomp:
        found = "--precomp 1, which has none" if args.precomp else f"--dataset {args.dataset}"
        raise InputError(
            f"--{asked[0]} is for the image ids of --dataset coco, not for {found}: leave it out"
        )
    check_installed()
