"""A checkpoint -> its table and results.json: what eval.py and train.py --eval 1 share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import final_evaluation, process_settings
from data import (
    open_features,
    open_image_cache,
    prepare_scenes,
    read_split,
    scenes_coverage,
    validation_loaders,
)
from lib import distributed
from lib.checkpoints.checkpoint import restore_model
from lib.checkpoints.hub import checkpoint_file
from lib.checkpoints.payloads import read_payload
from lib.data.splits import Split
from lib.errors import InputError
from lib.files import check_destination
from lib.methods.base import Method
from lib.methods.registry import get_method
from lib.model.precision import autocast_for
from lib.model.selection import control_selection
from lib.retrieval.evaluation import SplitLoaders, split_similarity, split_tables
from lib.retrieval.kept_area import named_area_kept
from lib.retrieval.result_files import file_digest, save_matrix, write_results
from lib.retrieval.tables import format_table
from vocab import checkpoint_tokenizer

# where the data lies and how it is read: always this call's, not the checkpoint's
DATA_FLAGS = """data_path image_path f30k_img_path coco_img_path batch_size workers amp
feature_cache""".split()
RESULTS = "results.json"  # beside the checkpoint


def evaluate_checkpoint(
    checkpoint: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Print the table of one checkpoint and write results.json beside it; return the results.

    `args` are eval.py's. Raises InputError for a checkpoint, data or destination that can't be
    used, the destinations before the work.
    """
    checkpoint = checkpoint_file(checkpoint)
    _check_destinations(checkpoint, args)
    cache = open_image_cache(args)
    payload = read_payload(checkpoint)
    paths = args.vit_path, args.bert_path
    model, trained = restore_model(checkpoint, payload, args.method, *paths, device)
    settings = evaluation_settings(args, trained)
    if args.shard_size:
        model.shard_size = args.shard_size
    _control(model, args.selection_control, trained)
    prepare_scenes(settings)
    tokenizer = checkpoint_tokenizer(payload, args.bert_path or trained.bert_path)
    split = read_split(settings, args.split, needs_dense=model.dense_owner is not None)
    pin = device.type == "cuda"
    features = open_features(settings, model.image_encoder, [(split, False)], device)
    loaders = validation_loaders(
        settings, split, tokenizer, model.dense_owner, pin, cache, features
    )
    started = time.perf_counter()
    autocast = autocast_for(args.amp, device)
    matrix = split_similarity(model, loaders, device, autocast)
    seconds = time.perf_counter() - started
    tables = split_tables(split.dataset, split.name, split.caption_image, matrix)
    facts = result_facts(checkpoint, model, trained, args, seconds)
    facts["images"], facts["captions"] = matrix.shape
    if distributed.is_main():
        facts |= _kept_area(settings, model, split, loaders, device, autocast)
    if args.selection_control:
        facts["selection_control"] = args.selection_control
        tables = {f"{name}_{args.selection_control}": table for name, table in tables.items()}
    results = {name: {**table, **facts} for name, table in tables.items()}
    if distributed.is_main():
        report(checkpoint, results, args, matrix)
    return results


def evaluate_best(args: argparse.Namespace) -> None:
    """Evaluate the best checkpoint of train.py's run on test; every rank calls it."""
    device = distributed.start_processes(**process_settings(args))
    asked = final_evaluation(args)
    evaluate_checkpoint(Path(asked.checkpoint), asked, device)


def _control(model: Method, control: str | None, trained: argparse.Namespace) -> None:
    """Put a control in the place of the model's choice of patches, where asked."""
    if control and not control_selection(model, control, trained.seed):
        raise InputError(
            f"--selection_control {control}: {model.name} keeps all patches; leave out the flag"
        )


def _kept_area(
    settings: argparse.Namespace,
    model: Method,
    split: Split,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
) -> dict[str, Any]:
    """Return how much of the things that captions name is kept, where the data set knows them."""
    if not model.uses_pixels or settings.dataset != "scenes" or settings.precomp:
        return {}
    coverage = scenes_coverage(settings, split, model.image_encoder.grid)
    found = named_area_kept(model, loaders, coverage, device, autocast)
    return {} if found is None else {"named_area": found}


def _check_destinations(checkpoint: Path, args: argparse.Namespace) -> None:
    if not distributed.is_main():
        return
    if args.save_results and checkpoint.is_file():
        check_destination(checkpoint.with_name(RESULTS), "--save_results")
    if args.save_similarity:
        check_destination(args.save_similarity, "--save_similarity")


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
        "trained_on_dense": get_method(model.name).trains_on_dense(trained),
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
    if facts["trained_on_dense"] and facts["protocol"] == "none":
        print(" (dense texts in training alone)", end="")
    print(f", checkpoint chosen on {facts['val_split']}, {facts['seconds']:.1f} s")
    print(format_table(results))
    for name, table in results.items():
        if table["ties"]:
            print(f"{name}: {table['ties']} tied queries, counted against the model")
    if "named_area" in facts:
        area = facts["named_area"]
        print(
            f"named area kept: {area['kept']:.3f} (patches at random {area['random']:.3f}, "
            f"the best choice of as many {area['boxes']:.3f})"
        )
    if args.save_results:
        path = checkpoint.with_name(RESULTS)
        write_results(path, results)
        print(f"written to {path}")
    if args.save_similarity:
        save_matrix(args.save_similarity, matrix)
        print(f"written to {args.save_similarity}")
