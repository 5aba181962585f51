"""A checkpoint -> its table, by any number of processes on any machines: eval.py --shards."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lib import distributed
from lib.checkpoints.hub import checkpoint_file
from lib.errors import InputError
from lib.model.precision import autocast_for
from lib.retrieval import outcome
from lib.retrieval.evaluation import result_names
from lib.retrieval.protocol import protocol_of
from lib.retrieval.result_files import RESULTS, code_digest
from lib.retrieval.shard_files import open_manifest
from lib.retrieval.sharded import ShardedEvaluation, stages_told
from scoring import (
    check_destinations,
    kept_areas,
    made_from,
    open_member,
    publish_tables,
    result_label,
)


def evaluate_in_shards(
    checkpoint: Path,
    args: argparse.Namespace,
    device: torch.device,
    may_idle: Collection[str] = (),
) -> dict[str, Any]:
    """Do this process's part of an evaluation in files; the last process prints and writes.

    Returns the results where everything is there, else nothing. Errors are those of
    `scoring.evaluate_checkpoint`, and InputError for a folder that another evaluation began.
    """
    checkpoint = checkpoint_file(checkpoint)
    check_destinations(checkpoint.with_name(RESULTS) if checkpoint.is_file() else None, args)
    member = open_member(checkpoint, args, device, may_idle)
    autocast = autocast_for(args.amp, device)
    how = args.shards, member.model, member.loaders, device, autocast
    names = result_names(member.split.dataset, args.split, member.loaders.num_images)
    work = ShardedEvaluation(*how, names, args.batch_size, args.shard_images)
    depends = {**made_from(member, args, device, anywhere=True), **work.settings}
    depends["code"] = code_digest()  # a commit tells nothing of changes to it
    with distributed.together():
        open_manifest(work.folder, depends)
    unseen = distributed.hosts_without(work.folder)
    if unseen:
        raise InputError(
            f"--shards {work.folder}: {', '.join(unseen)} does not see what rank 0 writes there; "
            "name a folder on a disk that all nodes share"
        )
    merged = work.finished()
    if merged is None:
        if distributed.is_main():
            outcome.say(work.told())
        return {}
    facts = {
        **member.facts,
        "protocol": protocol_of(*merged.carried, member.loaders.repeated_share),
        "seconds": round(sum(one["seconds"] for one in merged.stages.values()), 2),
        "stages": merged.stages,
        "hosts": merged.hosts,
    }
    facts |= distributed.on_main(lambda: kept_areas(member, args, device, autocast)) or {}
    measured = outcome.ranks_outcome(merged.ranks, args.recall_at, result_label(args))
    measured.notes.append(f"{args.shards}: {stages_told(merged.stages)}")
    measured = measured.with_facts(facts)
    distributed.on_main(lambda: publish_tables(str(checkpoint), checkpoint.parent, measured, args))
    return measured.tables
