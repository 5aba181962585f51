"""A checkpoint -> its table and results.json: what eval.py and train.py --eval 1 share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arguments import final_evaluation, parse_eval, process_settings
from data import (
    dense_cut,
    open_features,
    open_image_cache,
    pixel_loader,
    prepare_scenes,
    read_split,
    validation_loaders,
)
from lib import distributed
from lib.checkpoints.checkpoint import BEST, restore_model
from lib.checkpoints.hub import checkpoint_file
from lib.checkpoints.payloads import read_payload
from lib.data.fingerprint import check_same_files, files_fingerprint, split_fingerprint
from lib.data.scenes.facts import named_coverage
from lib.data.splits import Split, first_images, ids_in, warn_of_shared_images
from lib.errors import InputError
from lib.files import check_destination
from lib.methods.base import Method
from lib.methods.registry import get_method
from lib.methods.served import MEMBER_FLAGS, check_attention, set_control, without_idle
from lib.model.attention import cls_attention
from lib.model.encoders import warn_of_small_vocabulary
from lib.model.precision import autocast_for
from lib.retrieval import outcome
from lib.retrieval.analysis import analyse
from lib.retrieval.coco_labels import check_order, load_labels
from lib.retrieval.ensemble import (
    added,
    check_same_data,
    ensemble_facts,
    ensemble_folder,
    ensemble_label,
    uneven_spreads,
)
from lib.retrieval.evaluation import SplitLoaders, score_split
from lib.retrieval.gallery import Gallery
from lib.retrieval.kept_area import area_kept
from lib.retrieval.protocol import protocol_of
from lib.retrieval.rerank import rerank_split
from lib.retrieval.result_files import CHANGES, RESULTS, code_facts, file_digest, save_matrix
from lib.retrieval.shards import RowStore
from vocab import checkpoint_tokenizer

# where the data lies and how it is read: always this call's, not the checkpoint's
DATA_FLAGS = """data_path image_path f30k_img_path coco_img_path batch_size workers amp
feature_cache""".split()
# what an evaluation's rows depend on, beside the checkpoint, data and code
ROW_FLAGS = "vit_path bert_path amp selection_control".split()
UNFINISHED = ".unfinished_scores"  # folder beside the checkpoint: rows of a killed evaluation


@dataclass(frozen=True)
class Member:
    """A checkpoint made ready to score a split."""

    checkpoint: Path
    model: Method
    loaders: SplitLoaders
    gallery: Gallery
    facts: dict[str, Any]
    settings: argparse.Namespace
    split: Split


def evaluate_checkpoint(
    checkpoint: Path,
    args: argparse.Namespace,
    device: torch.device,
    may_idle: Collection[str] = (),
) -> dict[str, Any]:
    """Print the table of one checkpoint and write results.json beside it; return the results.

    `args` are eval.py's, `may_idle` as in `open_member`. Raises InputError for a checkpoint, data
    or destination that can't be used, the destinations before the work.
    """
    checkpoint = checkpoint_file(checkpoint)
    check_destinations(checkpoint.with_name(RESULTS) if checkpoint.is_file() else None, args)
    member = open_member(checkpoint, args, device, may_idle)
    rows = None if args.rerank else _row_store(member, args, device)
    started, autocast = time.perf_counter(), autocast_for(args.amp, device)
    if args.rerank:
        found = rerank_split(member.model, member.loaders, device, autocast, args.rerank)
        matrix, carried = None, found.carried
        measured = outcome.rerank_outcome(
            member.gallery, found, args.rerank, args.recall_at, result_label(args)
        )
    else:
        scores = score_split(member.model, member.loaders, device, autocast, store=rows)
        matrix, carried = scores.matrix, scores.carried
        measured = _shared(lambda: _measured(member.gallery, matrix, args))
    facts = {
        **member.facts,
        "protocol": protocol_of(*carried, member.loaders.repeated_share),
        "seconds": round(time.perf_counter() - started, 2),
    }
    facts |= distributed.on_main(lambda: kept_areas(member, args, device, autocast)) or {}
    measured = measured.with_facts(facts)

    def publish() -> None:
        publish_tables(str(checkpoint), checkpoint.parent, measured, args)
        _publish_matrix(member.gallery, matrix, measured, args)
        if rows is not None:
            rows.discard()

    distributed.on_main(publish)
    return measured.tables


def evaluate_ensemble(
    checkpoints: Sequence[Path], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Add the similarities of several checkpoints; print and write what their sum gives.

    The results go into a folder of their own. Raises InputError as `evaluate_checkpoint` does.
    """
    folder = ensemble_folder(args.runs, checkpoints, BEST)
    check_destinations(folder / RESULTS, args)
    started, autocast = time.perf_counter(), autocast_for(args.amp, device)
    names = [str(one.parent) for one in checkpoints]
    matrices, members, stores, served = [], [], [], set()
    for checkpoint in checkpoints:
        # a flag may serve some members alone; the last one refuses what has served none
        idle = served if len(members) == len(checkpoints) - 1 else MEMBER_FLAGS
        member = open_member(checkpoint, args, device, idle)
        served |= {flag for flag in MEMBER_FLAGS if getattr(member.settings, flag)}
        data = [*(one["data"] for one in members), member.facts["data"]]
        check_same_data(names[: len(data)], data)
        stores.append(_row_store(member, args, device))
        scores = score_split(member.model, member.loaders, device, autocast, store=stores[-1])
        matrices.append(scores.matrix)
        protocol = protocol_of(*scores.carried, member.loaders.repeated_share)
        members.append({**member.facts, "protocol": protocol})
    matrix = distributed.on_main(  # no other rank has them
        lambda: added(matrices, args.ensemble_weights)
    )
    label = ensemble_label(args.ensemble_weights)
    measured = _shared(lambda: _measured(member.gallery, matrix, args, label))
    facts = {**_shared_facts(member, args), **ensemble_facts(members)}
    measured = measured.with_facts({**facts, "seconds": round(time.perf_counter() - started, 2)})
    uneven = distributed.on_main(lambda: uneven_spreads(names, matrices, args.ensemble_weights))
    if uneven:
        measured.notes.append(uneven)

    def publish() -> None:
        publish_tables(f"ensemble {folder.name}", folder, measured, args)
        _publish_matrix(member.gallery, matrix, measured, args)
        for store in stores:
            if store is not None:
                store.discard()

    distributed.on_main(publish)
    return measured.tables


def member_checkpoint(path: str) -> Path:
    """Return the checkpoint of a member of an ensemble: a file, or the best one of a folder."""
    found = checkpoint_file(path)
    if not found.exists():
        raise InputError(f"--ensemble {path}: neither a checkpoint nor a folder that holds one")
    return found


def open_member(
    checkpoint: Path,
    args: argparse.Namespace,
    device: torch.device,
    may_idle: Collection[str] = (),
) -> Member:
    """Return the checkpoint's model, this rank's loaders of the split and the facts of both.

    A flag of `may_idle` is passed over where the model has no use for it. Raises InputError for a
    checkpoint or data that can't be used.
    """
    cache = open_image_cache(args)
    payload = read_payload(checkpoint)
    paths = args.vit_path, args.bert_path
    model, trained = restore_model(checkpoint, payload, args.method, *paths, device)
    args = without_idle(args, model, bool(trained.precomp), may_idle)
    settings = evaluation_settings(args, trained)
    if args.shard_size:
        model.shard_size = args.shard_size
    set_control(model, args.selection_control, trained.seed)
    if args.attention_kept:
        check_attention(model, bool(settings.precomp))
    prepare_scenes(settings)
    tokenizer = checkpoint_tokenizer(payload, args.bert_path or trained.bert_path)
    settings.text_positions = getattr(model.text_encoder, "max_positions", None)
    split = read_split(settings, args.split, needs_dense=model.dense_owner is not None)
    split = first_images(split, args.first_images)
    gallery = Gallery(
        split.dataset, split.name, split.captions, split.image_ids, split.caption_image
    )
    if args.evaluate_cxc or args.evaluate_eccv:  # before the work
        check_order(load_labels(), gallery.image_ids, gallery.caption_images)
    if not settings.precomp and args.split != "train":
        train_ids = ids_in(settings.data_path, settings.dataset, "train")
        warn_of_shared_images(split, train_ids, "train")
    _warn_of_vocabulary(model, tokenizer)
    if model.dense_owner is not None and distributed.is_main():
        print(dense_cut(settings, split, tokenizer))
    pin = device.type == "cuda"
    features = open_features(settings, model.image_encoder, [(split, False)], device)
    loaders = validation_loaders(
        settings, split, tokenizer, model.dense_owner, pin, cache, features
    )
    facts = result_facts(checkpoint, model, trained, args)
    trained_on = {"dataset": getattr(trained, "dataset", None), "data": payload.get("data")}
    facts |= {"data": split_fingerprint(split), "trained_on": trained_on}
    check_same_files(facts["data"])
    facts |= {"images": len(split.image_ids), "captions": len(split.captions)}
    return Member(checkpoint, model, loaders, gallery, facts, settings, split)


def _row_store(member: Member, args: argparse.Namespace, device: torch.device) -> RowStore | None:
    """Return where the rows of a killed evaluation lie, and finished ones go.

    None where the code has changes that no commit tells: its rows could be of other code.
    """
    if str(member.facts["commit"]).endswith(CHANGES):
        return None
    name = f"{member.split.dataset}_{member.split.name}{result_label(args)}"
    folder = member.checkpoint.with_name(UNFINISHED)
    depends = made_from(member, args, device)
    return RowStore(folder, depends, len(member.gallery.captions), name)


def made_from(
    member: Member, args: argparse.Namespace, device: torch.device, anywhere: bool = False
) -> dict[str, Any]:
    """Return what scores depend on; of image files with `anywhere` no more than names and sizes."""
    facts, split = member.facts, member.split
    files = split.image_files if split.regions is None else [split.regions.file]
    known = "checkpoint_sha256", "data", "commit", "versions", "method"
    return {
        **{name: facts[name] for name in known},
        "images": distributed.broadcast_value(
            distributed.on_main(lambda: files_fingerprint(files, anywhere))
        ),
        "device": device.type,
        "feature_cache": bool(args.feature_cache),
        **{name: getattr(args, name) for name in ROW_FLAGS},
    }


def _shared(work: Callable[[], outcome.Outcome]) -> outcome.Outcome:
    """Return on every rank what rank 0, which alone has the matrix, makes of it."""
    return distributed.broadcast_value(distributed.on_main(work))


def _measured(
    gallery: Gallery, matrix: Any, args: argparse.Namespace, label: str = ""
) -> outcome.Outcome:
    label += result_label(args)
    labels = {"cxc": bool(args.evaluate_cxc), "eccv": bool(args.evaluate_eccv), "label": label}
    return outcome.matrix_outcome(gallery, matrix, args.recall_at, **labels)


def result_label(args: argparse.Namespace) -> str:
    """Return the end of the names of entries of a part of a split, and of those a control made."""
    part = f"_first{args.first_images}" if args.first_images else ""
    return part + (f"_{args.selection_control}" if args.selection_control else "")


def publish_tables(
    title: str, folder: Path, measured: outcome.Outcome, args: argparse.Namespace
) -> None:
    outcome.show(title, measured)
    if args.save_results:
        print(f"written to {outcome.store(folder, measured)}")


def _publish_matrix(
    gallery: Gallery, matrix: Any, measured: outcome.Outcome, args: argparse.Namespace
) -> None:
    """Write the similarity matrix and the failure analysis, where asked and where there is one."""
    if args.save_similarity and matrix is not None:
        save_matrix(args.save_similarity, matrix)
        print(f"written to {args.save_similarity}")
    if args.analyse and matrix is not None:
        whole = list(measured.ranks.values())[-1]
        for line in analyse(args.analyse, gallery, matrix, whole):
            outcome.say(line)
        print(f"written to {args.analyse}")


def evaluate_best(args: argparse.Namespace) -> None:
    """Evaluate the best checkpoint of train.py's run on test; every rank calls it."""
    device = distributed.start_processes(**process_settings(args))
    asked = final_evaluation(args)
    evaluate_checkpoint(Path(asked.checkpoint), asked, device)


def kept_areas(
    member: Member, args: argparse.Namespace, device: torch.device, autocast: Callable
) -> dict[str, Any]:
    """Return what the patches kept hold: of what captions name where that is known, of attention.

    The latter is [CLS]'s in the image encoder, where --attention_kept asks for it.
    """
    model, settings, split = member.model, member.settings, member.split
    if not model.uses_pixels or settings.precomp:
        return {}
    coverage = {}
    if settings.dataset == "scenes":
        root = Path(settings.data_path) / "scenes"
        coverage["named_area"] = named_coverage(root, split, model.image_encoder.grid)
    if args.attention_kept:
        attention = cls_attention(model.image_encoder, device)
        maps = [attention(batch.pixels) for batch in pixel_loader(settings, split)]
        coverage["attention_kept"] = torch.cat(maps).cpu().numpy()[split.caption_image]
    if not coverage:
        return {}
    return area_kept(model, member.loaders, coverage, device, autocast)


def _warn_of_vocabulary(model: Method, tokenizer: Any) -> None:
    config = getattr(getattr(model.text_encoder, "backbone", None), "config", None)
    if config is not None:
        warn_of_small_vocabulary(tokenizer.vocab_size, config.vocab_size, "the checkpoint")


def check_destinations(results: Path | None, args: argparse.Namespace) -> None:
    """Raise InputError, on every rank, where rank 0 can't write what is asked for."""

    def check() -> None:
        if args.save_results and results is not None:
            check_destination(results, "--save_results", make_folder=True)
        if args.save_similarity:
            check_destination(args.save_similarity, "--save_similarity")
        if args.analyse:
            check_destination(Path(args.analyse) / "ranks.csv", "--analyse", make_folder=True)

    distributed.on_main(check)


def evaluation_settings(args: argparse.Namespace, trained: argparse.Namespace):
    """Return the trained arguments with where the data lies, and how to read it, from this call."""
    settings = argparse.Namespace(**vars(trained))
    settings.dataset = args.dataset or trained.dataset
    for name in DATA_FLAGS:
        setattr(settings, name, getattr(args, name))
    settings.scenes_size = args.scenes_size or getattr(trained, "scenes_size", None)
    settings.selection_control = args.selection_control
    return settings


def result_facts(
    checkpoint: Path, model: Method, trained: argparse.Namespace, args: argparse.Namespace
) -> dict[str, Any]:
    """Return what says how the numbers come about, but for the data, protocol and time."""
    return {
        "method": model.name,
        "trained_on_dense": get_method(model.name).trains_on_dense(trained),
        "dense_side": {"image": "image", "caption": "caption", None: "none"}[model.dense_owner],
        "split": args.split,
        "val_split": getattr(trained, "val_split", "test"),
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_digest(checkpoint),
        **({"selection_control": args.selection_control} if args.selection_control else {}),
        "flags": _changed_flags(args),
        **code_facts(),
    }


def _changed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of eval.py's flags that are not at their default, as plain values."""
    defaults = vars(parse_eval([]))
    return {
        flag: value
        for flag, value in vars(args).items()
        if flag in defaults and value != defaults[flag]
    }


def _shared_facts(member: Member, args: argparse.Namespace) -> dict[str, Any]:
    """Return the facts of an ensemble that are not one member's."""
    shared = ("split", "data", "images", "captions", "flags", "commit", "versions", "date")
    return {name: member.facts[name] for name in shared}
