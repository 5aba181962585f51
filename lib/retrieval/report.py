"""A report of runs as one HTML file that holds all it shows: tables, curves, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lib.errors import InputError
from lib.files import read_json
from lib.retrieval.metrics import DIRECTIONS, RECALL_AT, QueryRanks
from lib.retrieval.protocol import ORACLE_LINE, PROTOCOLS
from lib.retrieval.result_files import StoredResult
from lib.retrieval.sheets import require_matplotlib
from lib.retrieval.significance import Compared

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
CURVES = {  # heading -> the tags of TensorBoard that begin so
    "loss": ("train/loss",),
    "validation rSum": ("val/rsum",),
    "validation recall@1": ("val/i2t_r1", "val/t2i_r1"),
    "learning rate": ("lr/heads", "lr/backbones"),
}
LENGTHS = (0, 6, 9, 12, 15, 20, 10**9)  # words of a caption: the bounds of the groups
STYLE = """
:root {color-scheme: light}
body {font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 0 auto;
  padding: 16px; overflow-wrap: anywhere}
h1 {font-size: 1.6em} h2 {border-bottom: 1px solid #ccc; margin-top: 2em}
table {border-collapse: collapse; font-size: 0.9em; font-variant-numeric: tabular-nums}
th, td {padding: 3px 7px; text-align: right; border-bottom: 1px solid #ddd}
th:first-child, td:first-child {text-align: left}
td {white-space: nowrap; overflow-wrap: normal} th {overflow-wrap: normal; vertical-align: bottom}
.flags td {white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top}
.wide {overflow-x: auto} .oracle td {color: #777}
figure {margin: 1em 0; break-inside: avoid} figcaption, .small {font-size: 0.85em; color: #555}
img {max-width: 100%; height: auto}
.row {display: flex; flex-wrap: wrap; gap: 8px} .row + .row {margin-top: 10px}
.row figure {width: 150px; margin: 0}
.right {outline: 3px solid #228833} .query {break-inside: avoid; margin-bottom: 1.4em}
@media print {body {max-width: none; font-size: 11px} h2 {break-after: avoid}
  .wide {overflow: visible} table:not(.flags) {break-inside: avoid} .row figure {width: 105px}
  details::details-content {content-visibility: visible}}
"""


@dataclass
class RunReport:
    """What a run folder holds, read for a report."""

    folder: Path
    name: str
    arguments: dict[str, Any]
    results: dict[str, StoredResult]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # tag -> steps, values
    captions: dict[str, list[str]] = field(default_factory=dict)  # of each entry's split, in order
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A picture that a query was answered with."""

    picture: np.ndarray
    score: float
    right: bool


@dataclass(frozen=True)
class Example:
    """A query with its best answers; `rank` is that of the right one, `sheet` its kept patches."""

    kind: str
    caption: str
    rank: int
    answers: list[Answer]
    kept: dict[str, np.ndarray] = field(default_factory=dict)  # the right image, by branch
    sheet: np.ndarray | None = None


def read_run(folder: str | Path, results: dict[str, StoredResult], name: str) -> RunReport:
    """Return a run folder's arguments and curves with its results."""
    folder = Path(folder)
    return RunReport(folder, name, read_json(folder / "args.json"), results, read_curves(folder))


def read_curves(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the scalars of a run's TensorBoard events; empty where it has none.

    Raises InputError where tensorboard is missing.
    """
    if not list(folder.glob("events.out*")):
        return {}
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise InputError(f"no curves without tensorboard ({error})") from None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 2000, "images": 1})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        found[tag] = (
            np.array([one.step for one in scalars]),
            np.array([one.value for one in scalars]),
        )
    return found


# --- the page ----------------------------------------------------------------------------------


def page(runs: Sequence[RunReport], compared: Mapping[str, Sequence[Compared]], title: str) -> str:
    """Return the whole report; `compared` holds each later run's differences from the first."""
    parts = [
        f"<h1>{_text(title)}</h1>",
        "<h2>Results</h2>",
        recall_table(runs),
        significance(compared),
        "<h2>Curves</h2>",
        *curves(runs),
        "<h2>Recall by caption length</h2>",
        by_length(runs),
        *(part for run in runs for part in examples(run)),
        "<h2>Arguments and data</h2>",
        arguments(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def recall_table(runs: Sequence[RunReport]) -> str:
    """Return the table of every run's entries, with intervals; oracle rows below a line."""
    heads = ["run", "protocol"]
    heads += [f"{way.upper()} R@{k}" for way in DIRECTIONS for k in RECALL_AT]
    heads += ["rSum", "95 %", "images", "captions"]
    rows = [
        (one.facts.get("protocol", "none"), [f"{run.name}, {name}", *_cells(one)])
        for run in runs
        for name, one in run.results.items()
    ]
    if not rows:
        return "<p>No results yet: eval.py writes them.</p>"
    honest = [cells for protocol, cells in rows if protocol != "oracle"]
    oracle = [cells for protocol, cells in rows if protocol == "oracle"]
    body = "".join(f"<tr>{_tds(cells)}</tr>" for cells in honest)
    if oracle:
        body += f'<tr><td colspan="{len(heads)}">{_text(ORACLE_LINE)}</td></tr>'
        body += "".join(f'<tr class="oracle">{_tds(cells)}</tr>' for cells in oracle)
    told = "; ".join(f"<b>{name}</b>: {meaning}" for name, meaning in PROTOCOLS.items())
    return _table(heads, body) + f'<p class="small">Protocols: {told}. Recall in percent.</p>'


def _cells(one: StoredResult) -> list[str]:
    facts = one.facts
    cells = [str(facts.get("protocol", "none"))]
    cells += [f"{facts[way][f'r{k}']:.1f}" for way in DIRECTIONS for k in RECALL_AT]
    interval = facts.get("intervals", {}).get("rsum")
    cells.append(f"{facts['rsum']:.1f}")
    cells.append(f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "")
    return [*cells, str(facts.get("images", "")), str(facts.get("captions", ""))]


def significance(compared: Mapping[str, Sequence[Compared]]) -> str:
    """Return the paired differences of each run from the first; empty where there are none."""
    rows = []
    for name, entries in compared.items():
        for entry in entries:
            one = entry.differences["rsum"]
            clear = "yes" if one.is_shown else "no"
            shown = f"{one.mean:+.1f}", f"{one.low:+.1f} to {one.high:+.1f}", f"{one.p:.4f}"
            rows.append(f"<tr>{_tds([name, entry.name, *shown, clear])}</tr>")
    if not rows:
        return ""
    heads = ["difference", "entry", "rSum", "95 %", "p", "beyond chance"]
    note = "Paired bootstrap over images: both runs are asked the same queries."
    return "<h3>Significance</h3>" + _table(heads, "".join(rows)) + f'<p class="small">{note}</p>'


def curves(runs: Sequence[RunReport]) -> list[str]:
    """Return a figure a kind of curve that any run has."""
    figures = []
    for heading, tags in CURVES.items():
        lines = []
        for number, run in enumerate(runs):
            found = [tag for tag in tags if tag in run.curves]
            lines += [
                (f"{run.name} {tag}", number, n, *run.curves[tag]) for n, tag in enumerate(found)
            ]
        if lines:
            figures.append(_curve_figure(heading, lines))
    return figures or ["<p>No TensorBoard events in these folders.</p>"]


def _curve_figure(heading: str, lines: Sequence[tuple]) -> str:
    figure_class, canvas_class = require_matplotlib()
    figure = figure_class(figsize=(8, 2.8), layout="constrained")
    canvas_class(figure)
    axes = figure.subplots()
    for label, number, style, steps, values in lines:
        axes.plot(
            steps,
            values,
            color=COLOURS[number % len(COLOURS)],
            linestyle=("-", "--", ":")[style % 3],
            marker="o" if len(steps) < 15 else None,
            markersize=3,
            label=label,
        )
    axes.set_xlabel("step")
    axes.set_title(heading, loc="left", fontsize=11)
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(
        "<svg ", '<svg style="width:100%;height:auto" ', 1
    )
    return f"<figure>{drawing}</figure>"


def by_length(runs: Sequence[RunReport]) -> str:
    """Return text-to-image R@1 and R@10 of captions grouped by their number of words."""
    rows = []
    for run in runs:
        for name, one in run.results.items():
            texts = run.captions.get(name)
            if texts is not None and one.ranks is not None:
                rows += [
                    f"<tr>{_tds([f'{run.name}, {name}', *cells])}</tr>"
                    for cells in length_rows(one.ranks, texts)
                ]
    if not rows:
        return "<p>The captions of these results were not at hand.</p>"
    return _table(["run", "words", "captions", "T2I R@1", "T2I R@10"], "".join(rows))


def length_rows(ranks: QueryRanks, captions: Sequence[str]) -> list[list[str]]:
    """Return [words, captions, R@1, R@10] of each group of caption lengths that has any."""
    words = np.array([len(one.split()) for one in captions])
    rows = []
    for low, high in pairwise(LENGTHS):
        found = ranks.t2i[(words > low) & (words <= high)]
        if len(found):
            told = f"{low + 1} to {high}" if high < LENGTHS[-1] else f"more than {low}"
            shares = [f"{100 * np.mean(found <= k):.1f}" for k in (1, 10)]
            rows.append([told, str(len(found)), *shares])
    return rows


def examples(run: RunReport) -> list[str]:
    """Return the best and worst retrievals of a run with pictures."""
    parts = []
    for kind in dict.fromkeys(one.kind for one in run.examples):
        parts.append(f"<h2>{_text(f'{kind} retrievals, {run.name}')}</h2>")
        parts += [_example(one) for one in run.examples if one.kind == kind]
    return parts


def _example(one: Example) -> str:
    shown = "".join(
        f"<figure>{image_tag(answer.picture, 150, 'right' if answer.right else '')}"
        f"<figcaption>{answer.score:.3f}{', right' if answer.right else ''}</figcaption></figure>"
        for answer in one.answers
    )
    sheet = ""
    if one.sheet is not None:
        what = "what the model sees in the right image"
        sheet = f"<details><summary>{what}</summary>{image_tag(one.sheet, 1200)}</details>"
    kept = "".join(
        f"<figure>{image_tag(picture, 150)}"
        f"<figcaption>kept, {_text(branch)} text</figcaption></figure>"
        for branch, picture in one.kept.items()
    )
    rows = f'<div class="row">{shown}</div>' + (f'<div class="row">{kept}</div>' if kept else "")
    head = f"<p>“{_text(one.caption)}”, right image at rank {one.rank}</p>"
    return f'<div class="query">{head}{rows}{sheet}</div>'


def arguments(runs: Sequence[RunReport]) -> str:
    """Return the flags: those in which the runs differ on top, the others folded away."""
    flags = sorted(set().union(*(run.arguments for run in runs)))
    differing: list[tuple[str, list[str]]] = []
    alike: list[tuple[str, list[str]]] = []
    for flag in flags:
        values = [str(run.arguments.get(flag, "")) for run in runs]
        (differing if len(set(values)) > 1 else alike).append((flag, values))
    heads = ["flag", *(run.name for run in runs)]
    facts = "".join(f"<p>{_text(line)}</p>" for run in runs for line in _data_facts(run))
    parts = [facts]
    if differing:
        parts.append(
            "<h3>Where the runs differ</h3>" + _table(heads, _flag_rows(differing), "flags")
        )
    if alike:
        rows = _flag_rows([(flag, values[:1]) for flag, values in alike])
        what = "All flags" if len(runs) == 1 else "Flags alike"
        table = _table(["flag", "value"], rows, "flags")
        parts.append(f"<details><summary>{what}</summary>{table}</details>")
    return "".join(parts)


def _data_facts(run: RunReport) -> list[str]:
    lines = []
    for name, one in run.results.items():
        facts = one.facts
        known = ("method", "dense_side", "val_split", "checkpoint_sha256", "commit", "date")
        told = ", ".join(f"{key} {facts[key]}" for key in known if facts.get(key) is not None)
        lines.append(f"{run.name}, {name}: {told}")
    return lines


# --- pieces ------------------------------------------------------------------------------------


def image_tag(pixels: np.ndarray, width: int, kind: str = "") -> str:
    """Return an <img> that holds the picture itself, at most `width` pixels wide."""
    if pixels.shape[1] > width:
        height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    data = base64.b64encode(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]).decode()
    return f'<img class="{kind}" alt="" src="data:image/jpeg;base64,{data}">'


def _flag_rows(flags: Sequence[tuple[str, list[str]]]) -> str:
    return "".join(f"<tr>{_tds([flag, *values])}</tr>" for flag, values in flags)


def _table(heads: Sequence[str], body: str, kind: str = "") -> str:
    top = "".join(f"<th>{_text(one)}</th>" for one in heads)
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{inner}</table></div>'


def _tds(cells: Sequence[str]) -> str:
    return "".join(f"<td>{_text(one)}</td>" for one in cells)


def _text(value: Any) -> str:
    return html.escape(str(value))
