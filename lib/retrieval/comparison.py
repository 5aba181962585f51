"""Runs of several methods and seeds -> means, markdown tables a protocol each, a bar chart."""

from __future__ import annotations

import io
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.files import write_bytes_whole
from lib.retrieval.protocol import PROTOCOLS

COLOURS = {"none": "#4477aa", "image": "#228833", "oracle": "#cc6677"}
RECALLS = tuple((way, f"r{k}") for way in ("i2t", "t2i") for k in (1, 5, 10))
HIGHEST_RSUM = 600
DENSE_MARK, DENSE_NOTE = "†", "trained with dense texts; no query or gallery item carries one"
# Flags that change where, how fast or how loudly a run works, never what it learns.
WITHOUT_EFFECT = {
    "dist_backend",
    "dist_url",
    "gpu_id",
    "local_rank",
    "log_step",
    "logger_name",
    "overwrite",
    "rank",
    "resume",
    "save_step",
    "workers",
}


@dataclass(frozen=True)
class Row:
    """A line of the comparison: its name, and the train.py flags that make it."""

    name: str
    flags: tuple[str, ...]
    baseline: bool = False  # others of its protocol are compared with the best of these


@dataclass(frozen=True)
class FinishedRun:
    """What one seed of a row measured; `tables` are results.json's entries by split."""

    row: Row
    seed: int
    tables: dict[str, dict[str, Any]]
    parameters: int
    seconds: float
    machine: str
    folder: Path | None = None  # with results.json and the ranks of each query

    @property
    def protocol(self) -> str:
        return self.tables["test"]["protocol"]

    @property
    def trained_on_dense(self) -> bool:
        """Return whether dense texts took part in training; older results don't tell."""
        return bool(self.tables["test"].get("trained_on_dense", False))


@dataclass(frozen=True)
class Summary:
    """A row over its seeds: recalls in percent; rSum 0-600 as mean, standard deviation or None."""

    row: Row
    protocol: str
    seeds: tuple[int, ...]
    recalls: dict[tuple[str, str], float]
    rsum: dict[str, tuple[float, float | None]]  # by split
    parameters: int
    seconds: float
    dense_in_training_alone: bool = False


def summarize(runs: Sequence[FinishedRun]) -> list[Summary]:
    """Return a Summary a row and protocol, in the order of the runs.

    The standard deviation is that of a sample (n - 1); None with a single seed.
    """
    rows: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        rows.setdefault((run.row.name, run.protocol), []).append(run)
    return [_summary(group) for group in rows.values()]


def _summary(runs: Sequence[FinishedRun]) -> Summary:
    def spread(split: str) -> tuple[float, float | None]:
        values = [run.tables[split]["rsum"] for run in runs]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    first = runs[0]
    return Summary(
        row=first.row,
        protocol=first.protocol,
        seeds=tuple(sorted(run.seed for run in runs)),
        recalls={
            (way, k): statistics.fmean(run.tables["test"][way][k] for run in runs)
            for way, k in RECALLS
        },
        rsum={split: spread(split) for split in first.tables},
        parameters=first.parameters,
        seconds=statistics.fmean(run.seconds for run in runs),
        dense_in_training_alone=first.protocol == "none" and first.trained_on_dense,
    )


def by_protocol(summaries: Sequence[Summary], split: str = "test") -> dict[str, list[Summary]]:
    """Return the rows of each protocol that has any, highest mean rSum on `split` first."""
    unknown = {one.protocol for one in summaries} - set(PROTOCOLS)
    if unknown:
        raise ValueError(f"unknown protocol {unknown.pop()!r}; known: {', '.join(PROTOCOLS)}")
    ranked = sorted(summaries, key=lambda one: -one.rsum[split][0])
    groups = {name: [one for one in ranked if one.protocol == name] for name in PROTOCOLS}
    return {name: group for name, group in groups.items() if group}


# --- the page ----------------------------------------------------------------------------------


def markdown_table(
    summaries: Sequence[Summary],
    splits: Sequence[str] = ("test",),
    recalls: bool = True,
    against: Mapping[str, str] | None = None,
    intervals: Mapping[str, str] | None = None,
) -> str:
    """Return a markdown table, a line a row: test recalls where wanted, rSum of each split.

    `against`: what each row's difference to the baseline is, `intervals`: that of its rSum, by row,
    where they are known.
    """
    heads = ["row", "train.py flags"]
    if recalls:
        heads += [f"{way.upper()} R@{k[1:]}" for way, k in RECALLS]
    heads += ["rSum" if len(splits) == 1 else f"{split} rSum" for split in splits]
    if intervals:
        heads.append("95 % interval")
    if against:
        heads.append("rSum − baseline")
    heads += ["parameters", "training, s", "seeds"]
    lines = [heads, ["---", "---"] + ["---:"] * (len(heads) - 2)]
    for one in summaries:
        mark = f" {DENSE_MARK}" if one.dense_in_training_alone else ""
        cells = [one.row.name + mark, f"`{' '.join(one.row.flags)}`"]
        if recalls:
            cells += [f"{one.recalls[recall]:.1f}" for recall in RECALLS]
        cells += [format_spread(*one.rsum[split]) for split in splits]
        if intervals:
            cells.append(intervals.get(one.row.name, "–"))
        if against:
            cells.append(against.get(one.row.name, "–"))
        cells += [f"{one.parameters:,}", f"{one.seconds:,.0f}", ", ".join(map(str, one.seeds))]
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
    marked = any(one.dense_in_training_alone for one in summaries)
    return table + (f"\n{DENSE_MARK} {DENSE_NOTE}\n" if marked else "")


def format_spread(mean: float, deviation: float | None) -> str:
    """Return `512.3 ± 1.2`, or the mean alone where there is no deviation."""
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def report_page(
    title: str,
    facts: Sequence[str],
    groups: Mapping[str, Sequence[Summary]],
    unfinished: Sequence[str],
    chart: str | None = None,
    splits: Sequence[str] = ("test",),
    recalls: bool = True,
    against: Mapping[str, Mapping[str, str]] | None = None,
    intervals: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Return the whole markdown page: facts, a table a protocol, what is not finished.

    `against`: by protocol and row, how the row differs from the baseline; `intervals`: of its rSum.
    """
    parts = [f"# {title}\n", "\n".join(f"- {fact}" for fact in facts) + "\n"]
    for name, group in groups.items():
        own = {row: told for (protocol, row), told in (intervals or {}).items() if protocol == name}
        table = markdown_table(group, splits, recalls, (against or {}).get(name), own)
        parts.append(f"## Protocol `{name}`: {PROTOCOLS[name]}\n\n{table}")
    if not groups:
        parts.append("No run is finished yet.\n")
    if chart:
        parts.append(f"![rSum of every row]({chart})\n")
    if unfinished:
        parts.append("## Not finished\n\n" + "\n".join(f"- {line}" for line in unfinished) + "\n")
    return "\n".join(parts)


# --- the chart ---------------------------------------------------------------------------------


def require_matplotlib() -> type:
    """Return matplotlib's Figure; it is needed for charts alone, so it is imported here.

    Raises InputError where it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"no chart without matplotlib ({error}): python -m pip install -r "
            "requirements-dev.txt, then give the same command again"
        ) from None
    return Figure


def draw_chart(
    groups: Mapping[str, Sequence[Summary]], path: str | Path, title: str, split: str = "test"
) -> None:
    """Write a PNG: a panel a protocol with its own colour, a bar a row, deviations as error bars.

    Raises InputError where matplotlib is missing, ValueError where there is no row.
    """
    if not groups:
        raise ValueError("there is no row to draw")
    counts = [len(group) for group in groups.values()]
    figure = require_matplotlib()(
        figsize=(8.5, 1.1 + 0.55 * len(counts) + 0.34 * sum(counts)), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    panels = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in counts]
    )[:, 0]
    for panel, (protocol, group) in zip(panels, groups.items(), strict=True):
        _draw_panel(panel, protocol, group, split)
    limits = _limits([one.rsum[split] for group in groups.values() for one in group])
    panels[0].set_xlim(*limits)
    panels[0].set_xticks([one for one in panels[0].get_xticks() if 0 <= one <= HIGHEST_RSUM])
    panels[0].set_xlim(*limits)  # ticks may have widened it
    panels[-1].set_xlabel(f"{split} rSum: mean, standard deviation over seeds", fontsize=10)
    figure.suptitle(title, fontsize=12)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    write_bytes_whole(Path(path), drawn.getvalue())


def _draw_panel(panel: Any, protocol: str, group: Sequence[Summary], split: str) -> None:
    means = [one.rsum[split][0] for one in group]
    deviations = [one.rsum[split][1] or 0.0 for one in group]
    places = range(len(group))
    panel.barh(places, means, height=0.7, color=COLOURS[protocol])
    panel.errorbar(means, places, xerr=deviations, fmt="none", ecolor="#222222", capsize=3, lw=1.2)
    for place, one in zip(places, group, strict=True):
        mean, deviation = one.rsum[split]
        panel.annotate(
            format_spread(mean, deviation),
            (mean + (deviation or 0.0), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    panel.set_yticks(list(places), [one.row.name for one in group], fontsize=10)
    panel.set_ylim(len(group) - 0.4, -0.6)  # the best on top
    panel.set_title(f"protocol {protocol}: {PROTOCOLS[protocol]}", loc="left", fontsize=10)
    panel.grid(axis="x", color="#dddddd", lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _limits(spreads: Sequence[tuple[float, float | None]]) -> tuple[float, float]:
    """Return the rSum axis: from 0, so that bars keep their proportions, with room for numbers."""
    highest = max(mean + (deviation or 0.0) for mean, deviation in spreads)
    return 0.0, max(1.0, 1.22 * highest)


# --- what a run was made with ------------------------------------------------------------------


def changed_settings(
    planned: Mapping[str, Any], saved: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Return `--flag old, now new` for each setting in which a saved run differs from the plan.

    A flag that the saved run did not know yet counts as at its default, an empty one (`--flag=`) as
    left out; flags that change nothing of what is learnt are passed over.
    """
    told = []
    for flag in sorted(set(planned) - WITHOUT_EFFECT):
        values = saved.get(flag, defaults.get(flag)), planned[flag]
        old, new = (None if value == "" else value for value in values)
        if flag == "val_split" and old == "held_out":
            old = "dev"  # what train.py makes of dev where dev has no dense texts
        if old != new:
            told.append(f"--{flag} {old}, now {new}")
    return told


def format_seconds(seconds: float) -> str:
    """Return `1:05:09` or `5:09`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def machine_name(gpu: str | None) -> str:
    """Return CPU model, usable cores and GPU of this machine in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count()
    return f"{cpu}, {cores} cores, {gpu or 'no GPU'}"


# --- files of a run ----------------------------------------------------------------------------


def last_line(log: Path) -> str:
    """Return the last line of a log that says anything; progress bars end in carriage returns."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
