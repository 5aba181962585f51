"""Scores of a split -> tables with what made them: printed, and written beside each other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.retrieval.coco_labels import cxc_metrics, eccv_metrics
from lib.retrieval.evaluation import ranks_table, result_names, split_ranks
from lib.retrieval.gallery import Gallery
from lib.retrieval.metrics import DIRECTIONS, RECALL_AT, QueryRanks
from lib.retrieval.rerank import Reranked
from lib.retrieval.result_files import RESULTS, ranks_file, write_ranks, write_results
from lib.retrieval.tables import TABLE_WIDTH, format_table

AREAS = {"named_area": "named area", "attention_kept": "[CLS] attention"}
ECCV_NAMES = {"map_at_r": "mAP@R", "r_precision": "R-Precision", "r1": "R@1"}


@dataclass(frozen=True)
class Outcome:
    """The entries of a result by name, the ranks behind them, and lines to print below."""

    tables: dict[str, dict[str, Any]]
    ranks: dict[str, QueryRanks]
    recall_at: Sequence[int] = RECALL_AT
    notes: list[str] = field(default_factory=list)

    def with_facts(self, facts: Mapping[str, Any]) -> Outcome:
        """Return the outcome with what made it in every entry."""
        tables = {
            name: {**table, **facts, "ranks": ranks_file(name)}
            for name, table in self.tables.items()
        }
        return Outcome(tables, self.ranks, self.recall_at, self.notes)


def matrix_outcome(
    gallery: Gallery,
    matrix: np.ndarray,
    recall_at: Sequence[int] = RECALL_AT,
    cxc: bool = False,
    eccv: bool = False,
    label: str = "",
) -> Outcome:
    """Return recalls of a similarity matrix; CxC and ECCV Caption lie in the entry `coco_5k`.

    `label` ends the names of entries that are no single model's. Raises NonFiniteError for a matrix
    that is not finite, InputError where the labels do not fit.
    """
    found = split_ranks(gallery.dataset, gallery.split, gallery.caption_images, matrix)
    outcome = ranks_outcome(found, recall_at, label)
    whole = outcome.tables[list(outcome.tables)[-1]]
    of_captions = matrix, gallery.image_ids, gallery.caption_images
    if cxc:
        whole["cxc"] = cxc_metrics(*of_captions, recall_at)
    if eccv:
        whole["eccv"] = eccv_metrics(*of_captions)
        outcome.notes.extend(_eccv_lines(whole["eccv"]))
    return outcome


def ranks_outcome(
    found: Mapping[str, QueryRanks], recall_at: Sequence[int] = RECALL_AT, label: str = ""
) -> Outcome:
    """Return recalls of exact ranks by name; `label` as in `matrix_outcome`."""
    tables = {name + label: ranks_table(one, recall_at) for name, one in found.items()}
    return Outcome(tables, {name + label: one for name, one in found.items()}, recall_at)


def rerank_outcome(
    gallery: Gallery,
    found: Reranked,
    shortlist: int,
    recall_at: Sequence[int] = RECALL_AT,
    label: str = "",
) -> Outcome:
    """Return the recalls of shortlists of `shortlist` candidates, marked approximate by name.

    `label` ends the name of an entry that is no single model's own.
    """
    images = len(gallery.image_ids)
    plain = list(result_names(gallery.dataset, gallery.split, images))[-1]
    name = f"{plain}_rerank{shortlist}{label}"
    kept = {way: {f"r{k}": share for k, share in found.kept[way].items()} for way in DIRECTIONS}
    table = ranks_table(found.ranks, recall_at)
    table["approximate"] = {"shortlist": shortlist, "kept": kept, "sampled": found.sampled}
    share = 100 * found.pairs / (images * len(gallery.captions))
    lines = [f"approximate: {found.pairs:,} pairs scored, {share:.1f} % of all"]
    for way in DIRECTIONS:
        told = "/".join(f"{value:.1f}" for value in found.kept[way].values())
        depths = "/".join(map(str, found.kept[way]))
        lines.append(
            f"of the exact top {depths} the {way.upper()} shortlist kept {told} % "
            f"({found.sampled[way]} queries looked at)"
        )
    return Outcome({name: table}, {name: found.ranks}, recall_at, lines)


def show(title: str, outcome: Outcome) -> None:
    """Print the table of an outcome with what a reader must know beside it."""
    facts = next(iter(outcome.tables.values()))
    protocol = facts["protocol"]
    if facts.get("trained_on_dense") and protocol == "none":
        protocol += " (dense texts in training alone)"
    say(
        f"{title}: {facts['method']}, protocol {protocol}, checkpoint chosen on "
        f"{facts['val_split']}, {facts['seconds']:.1f} s"
    )
    rows = {}
    for name, table in outcome.tables.items():
        rows[name] = table
        if "cxc" in table:
            rows[f"{name} CxC"] = {**table["cxc"], "protocol": table["protocol"]}
    print(format_table(rows, outcome.recall_at))
    for name, table in outcome.tables.items():
        if table["ties"]:
            say(f"{name}: {table['ties']} tied queries, counted against the model")
    for key, told in AREAS.items():
        if key in facts:
            area = facts[key]
            say(
                f"{told} kept: {area['kept']:.3f} (random patches {area['random']:.3f}, "
                f"the best choice {area['best']:.3f})"
            )
    for note in outcome.notes:
        say(note)


def say(line: str) -> None:
    """Print a line, its continuations indented where it is wider than a terminal."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(line, TABLE_WIDTH, subsequent_indent="  ", **options))


def store(folder: str | Path, outcome: Outcome) -> Path:
    """Write results.json and the ranks of every query beside it; return the former's path.

    The ranks are written first: an entry never names a file that is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in outcome.ranks.items():
        write_ranks(folder / ranks_file(name), found)
    write_results(folder / RESULTS, outcome.tables)
    return folder / RESULTS


def _eccv_lines(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = []
    for way in DIRECTIONS:
        told = ", ".join(f"{ECCV_NAMES[key]} {value:.1f}" for key, value in found[way].items())
        lines.append(f"ECCV Caption {way.upper()}: {told}")
    return lines
