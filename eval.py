"""Evaluate checkpoints: python eval.py --dataset f30k --data_path data/; see README.md."""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, which takes seconds
    from lib.program import prepare_terminal

    prepare_terminal()

import os

# read when torch loads: OpenMP threads that spin for long slow a busy CPU many times down
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import parse_eval, process_settings
from data import open_image_cache, prepare_scenes, read_split, validation_loaders
from lib import distributed
from lib.checkpoints.checkpoint import BEST, restore_model
from lib.checkpoints.payloads import read_payload
from lib.errors import InputError
from lib.methods.base import Method
from lib.model.precision import autocast_for
from lib.program import program, run_program
from lib.rendezvous import peers_told
from lib.retrieval.evaluation import split_similarity, split_tables
from lib.retrieval.result_files import file_digest, write_results
from lib.retrieval.tables import format_table
from vocab import checkpoint_tokenizer

# where the data lies and how it is read: always this call's, not the checkpoint's
DATA_FLAGS = "data_path image_path f30k_img_path coco_img_path batch_size workers".split()


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; return the exit code, as `program` says."""
    args = parse_eval(argv)
    with peers_told():
        device = distributed.start_processes(**process_settings(args))
        for checkpoint in find_checkpoints(args):
            evaluate_checkpoint(checkpoint, args, device)
    distributed.stop()
    return 0


def find_checkpoints(args: argparse.Namespace) -> list[Path]:
    """Return --checkpoint, or the best one of every run folder of the data set.

    Raises InputError where there is none.
    """
    if args.checkpoint:
        return [Path(args.checkpoint)]
    dataset = args.dataset or "f30k"
    folders = sorted(Path(args.runs).glob(f"{dataset}_*"))
    found = [folder / BEST for folder in folders if (folder / BEST).exists()]
    if not found:
        raise InputError(
            f"no {args.runs}/{dataset}_*/{BEST}: train a model first, or name a --checkpoint"
        )
    return found


def evaluate_checkpoint(
    checkpoint: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Print the table of one checkpoint and write results.json beside it; return the results."""
    cache = open_image_cache(args)
    payload = read_payload(checkpoint)
    paths = args.vit_path, args.bert_path
    model, trained = restore_model(checkpoint, payload, args.method, *paths, device)
    settings = evaluation_settings(args, trained)
    if args.shard_size:
        model.shard_size = args.shard_size
    prepare_scenes(settings)
    tokenizer = checkpoint_tokenizer(payload, args.bert_path or trained.bert_path)
    split = read_split(settings, args.split, needs_dense=model.dense_owner is not None)
    pin = device.type == "cuda"
    loaders = validation_loaders(settings, split, tokenizer, model.dense_owner, pin, cache)
    started = time.perf_counter()
    matrix = split_similarity(model, loaders, device, autocast_for(args.amp, device))
    seconds = time.perf_counter() - started
    tables = split_tables(split.dataset, split.name, split.caption_image, matrix)
    facts = result_facts(checkpoint, model, trained, args, seconds)
    facts["images"], facts["captions"] = matrix.shape
    results = {name: {**table, **facts} for name, table in tables.items()}
    if distributed.is_main():
        report(checkpoint, results, args, matrix)
    return results


def evaluation_settings(args: argparse.Namespace, trained: argparse.Namespace):
    """Return the trained arguments with where the data lies, and how to read it, from this call."""
    settings = argparse.Namespace(**vars(trained))
    settings.dataset = args.dataset or trained.dataset
    for name in DATA_FLAGS:
        setattr(settings, name, getattr(args, name))
    settings.scenes_size = args.scenes_size or getattr(trained, "scenes_size", None)
    return settings


def result_facts(
    checkpoint: Path,
    model: Method,
    trained: argparse.Namespace,
    args: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    """Return what says how the numbers came about."""
    return {
        "method": model.name,
        "protocol": model.protocol,
        "dense_side": {"image": "image", "caption": "caption", None: "none"}[model.dense_owner],
        "split": args.split,
        "val_split": getattr(trained, "val_split", "test"),
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_digest(checkpoint),
        "seconds": round(seconds, 2),
    }


def report(
    checkpoint: Path, results: dict[str, Any], args: argparse.Namespace, matrix: np.ndarray
) -> None:
    """Print the table; write results.json, and the similarity matrix where asked."""
    facts = next(iter(results.values()))
    print(f"{checkpoint}: {facts['method']}, protocol {facts['protocol']}", end="")
    print(f", checkpoint chosen on {facts['val_split']}, {facts['seconds']:.1f} s")
    print(format_table(results))
    for name, table in results.items():
        if table["ties"]:
            print(f"{name}: {table['ties']} tied queries, counted against the model")
    if args.save_results:
        path = checkpoint.with_name("results.json")
        write_results(path, results)
        print(f"written to {path}")
    if args.save_similarity:
        np.save(args.save_similarity, matrix)


if __name__ == "__main__":
    run_program(main)
