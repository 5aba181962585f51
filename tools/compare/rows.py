"""The rows of tools.compare: every method, variants of it, stages that start from another row."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from lib.errors import InputError
from lib.methods.registry import method_names
from lib.retrieval.comparison import Row

# Rows in the place of a method with its defaults; @ROW is that row's checkpoint of the same seed.
STAGES = {
    name: [
        Row(f"{name}_pretrain", ("--method", name, "--pretrain")),
        Row(
            name,
            (
                *("--method", name, "--distill", "--weight_path", f"@{name}_pretrain"),
                *("--use_decoder", "--num_tokens", "100"),
            ),
        ),
    ]
    for name in ("d2s", "d2s_released")
}
# What rows of a protocol are compared with, the best of them; seps_released among the oracles.
BASELINES = set(method_names()) - {"seps"}
# Rows beside each registered method with its defaults.
VARIANTS = [
    Row("seps_no_dense", ("--method", "seps", "--dense_side", "none")),
    Row("seps_match", ("--method", "seps", "--dense_match", "max_mean")),
    Row("seps_oracle", ("--method", "seps", "--dense_side", "caption")),
]
ABLATIONS = [
    Row("default", ("--method", "seps"), baseline=True),
    Row("gumbel", ("--method", "seps", "--selection", "gumbel")),
    Row("text_scores_only", ("--method", "seps", "--attention_weight", "1.0")),
    Row("patch_score_only", ("--method", "seps", "--attention_weight", "0.0")),
    Row("relevance_mlp", ("--method", "seps", "--relevance", "topk_mlp")),
    Row("relevance_none", ("--method", "seps", "--relevance", "mean")),
    Row("no_dense", ("--method", "seps", "--dense_side", "none")),
    Row("oracle_dense", ("--method", "seps", "--dense_side", "caption")),
    Row("no_aggregation", ("--method", "seps", "--aggr_ratio", "1.0")),
    Row("no_slimming", ("--method", "seps", "--sparse_ratio", "1.0", "--aggr_ratio", "1.0")),
    Row("detached", ("--method", "seps", "--detach_patches", "1")),
]


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Return every row of the table that the flags ask for, picked or not."""
    if args.ablations:
        return ABLATIONS
    rows = [STAGES.get(name, [Row(name, ("--method", name))]) for name in method_names()]
    methods = (replace(row, baseline=row.name in BASELINES) for row in chain.from_iterable(rows))
    return [*methods, *VARIANTS]


def pick_rows(rows: Sequence[Row], names: str | None) -> list[Row]:
    """Return the rows of a comma-separated list, those they start from before them; all for None.

    Raises InputError for others.
    """
    if names is None:
        return list(rows)
    known = {row.name: row for row in rows}
    picked: dict[str, Row] = {}
    for name in names.split(","):
        if name not in known:
            raise InputError(f"--rows {name}: no such row; there are {', '.join(known)}")
        before = [flag[1:] for flag in known[name].flags if flag.startswith("@")]
        picked |= {one: known[one] for one in (*before, name)}
    return list(picked.values())
