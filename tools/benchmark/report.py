"""Rows of a benchmark -> whether each bar is met, and the table that is printed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import torch

from lib.retrieval.comparison import machine_name

WIDTH = 110
# what a bar speaks of: how it is told, and how it is found in a row
LEAST = {"ratio": (">={:g}x", lambda row: row["ratio"])}
MOST = {
    "share_of_passes": ("<={:g}", lambda row: row["ratio"]),
    "memory": ("mem<={:g}", lambda row: row["memory_ratio"]),
    "gigabytes": ("<={:g}GB", lambda row: row["ours_memory"] and row["ours_memory"] / 1e9),
    "seconds": ("<={:g}s", lambda row: row["seconds"]),
}


def judge(row: dict[str, Any], bar: Mapping[str, float]) -> dict[str, Any]:
    """Return the row with ratios of ours to the loop, and the bar with whether it is met.

    `bar` maps names of `LEAST` and `MOST` to limits. `met` is None where something that the bar
    speaks of was not measured.
    """
    judged = dict(row, ratio=_quotient(row.get("ours"), row.get("loop")))
    judged["memory_ratio"] = _quotient(row.get("ours_memory"), row.get("loop_memory"))
    if not bar:
        return judged
    verdicts = []
    for what, limit in bar.items():
        found = {**LEAST, **MOST}[what][1](judged)
        verdicts.append(
            None if found is None else found >= limit if what in LEAST else found <= limit
        )
    met = False if False in verdicts else None if None in verdicts else True
    return dict(judged, bar=dict(bar), met=met)


def _quotient(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return machine, date and versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": machine_name(gpu),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }


# --- the page ------------------------------------------------------------------------------------


def page(found: Mapping[str, Any]) -> str:
    """Return the circumstances, the table, and the notes of the rows, at most 110 columns wide."""
    rows = found["rows"]
    head = f"{found['machine']}; torch {found['torch']}, {found['threads']} threads"
    lines = [f"{head}; {found['date']}", "", *table(rows)]
    for row in rows:
        if row.get("note"):
            lines += textwrap.wrap(f"{row['name']}: {row['note']}", WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table; columns that no row fills are left out."""
    shown = [
        (head, [show(row) for row in rows])
        for head, show in COLUMNS.items()
        if any(show(row) for row in rows)
    ]
    widths = [max(len(head), *map(len, cells)) for head, cells in shown]
    lines = ["  ".join(_aligned([head for head, _ in shown], widths))]
    lines.append("  ".join("-" * width for width in widths))
    for number in range(len(rows)):
        lines.append("  ".join(_aligned([cells[number] for _, cells in shown], widths)))
    return [line.rstrip() for line in lines]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _number(value: float | None) -> str:
    """Return three significant digits."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, digits)}f}"


def _bar(row: Mapping[str, Any]) -> str:
    told = [{**LEAST, **MOST}[what][0].format(limit) for what, limit in row["bar"].items()]
    verdict = {True: "met", False: "MISSED", None: "?"}[row["met"]]
    return f"{' '.join(told)} {verdict}"


def _memory(row: Mapping[str, Any]) -> str:
    """Return `loop / ours` in MiB."""
    found = [row.get("loop_memory"), row.get("ours_memory")]
    if found == [None, None]:
        return ""
    return " / ".join("-" if one is None else f"{one / 2**20:,.0f}" for one in found)


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "row": lambda row: row["name"],
    "loop": lambda row: _number(row.get("loop")),
    "ours": lambda row: _number(row.get("ours")),
    "unit": lambda row: row.get("unit", ""),
    "ratio": lambda row: f"{_number(row['ratio'])}x" if row.get("ratio") else "",
    "MiB": _memory,
    "roofline": lambda row: f"{100 * row['share']:.0f}%" if row.get("share") is not None else "",
    "bar": lambda row: _bar(row) if row.get("bar") else "",
}
