"""Rows of a benchmark -> whether each bar is met, and the table that is printed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH = 110
# what a bar speaks of: how it is told, and how it is found in a row
LEAST = {"ratio": (">={:g}x", lambda row: row["ratio"])}
MOST = {
    "share_of_passes": ("<={:g}", lambda row: row["ratio"]),
    "memory": ("mem<={:g}", lambda row: row["memory_ratio"]),
    "gigabytes": ("<={:g}GB", lambda row: row["ours_memory"] and row["ours_memory"] / 1e9),
    "seconds": ("<={:g}s", lambda row: row["seconds"]),
    "of_text": ("<={:g}x text", lambda row: row["of_text"]),  # the encoder's seconds
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


def filled(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the columns that any row fills, each with its cells."""
    columns = [(head, [show(row) for row in rows]) for head, show in COLUMNS.items()]
    return [(head, cells) for head, cells in columns if any(cells)]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table; columns that no row fills are left out."""
    shown = filled(rows)
    widths = [max(len(head), *map(len, cells)) for head, cells in shown]
    lines = ["  ".join(_aligned([head for head, _ in shown], widths))]
    lines.append("  ".join("-" * width for width in widths))
    for number in range(len(rows)):
        lines.append("  ".join(_aligned([cells[number] for _, cells in shown], widths)))
    return [line.rstrip() for line in lines]


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows with numbers."""
    return [row for row in rows if row.get("ours") is not None]


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the same table in Markdown, as docs/performance.md has it."""
    shown = filled(measured(rows))
    heads = [{"loop": "official way"}.get(head, head) for head, _ in shown]
    lines = [_cells(heads), "|".join(["", "---", *["---:"] * (len(shown) - 1), ""])]
    lines += [_cells(cells) for cells in zip(*(cells for _, cells in shown), strict=True)]
    return lines + unmeasured(rows)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def unmeasured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what failed, a line each with its reason, and in one line what was left out."""
    failed = [f"- {row['name']}: failed, {row['failed']}" for row in rows if row.get("failed")]
    missing = [row["name"] for row in rows if row.get("left_out")]
    told = [f"Left out, as the time did not suffice: {'; '.join(missing)}."] if missing else []
    return [*([""] if failed or told else []), *failed, *told]


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line a bar: what was asked, what was found, and whether that is met."""
    lines = []
    for row in rows:
        for what, limit in (row.get("bar") or {}).items():
            told, found_in = {**LEAST, **MOST}[what]
            reason = row.get("failed") or row.get("left_out")
            if reason:
                lines.append(f"{row['name']}: {told.format(limit)} not measured ({reason})")
                continue
            found = found_in(row)
            met = found is not None and (found >= limit if what in LEAST else found <= limit)
            verdict = "not measured" if found is None else "met" if met else "MISSED"
            lines.append(f"{row['name']}: {told.format(limit)} {verdict} ({_number(found)})")
    return lines


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


def _mebi(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "row": lambda row: row["name"],
    "loop": lambda row: _number(row.get("loop")),
    "ours": lambda row: _number(row.get("ours")),
    "unit": lambda row: row.get("unit", ""),
    "part": lambda row: f"{100 * row['part']:.0f}%" if "part" in row else "",
    "ratio": lambda row: f"{_number(row['ratio'])}x" if row.get("ratio") else "",
    "MiB": _memory,
    "roofline": lambda row: f"{100 * row['share']:.0f}%" if row.get("share") is not None else "",
    "ordinary ms/pair": lambda row: _number(row.get("ordinary_ms")),
    "cached ms/pair": lambda row: _number(row.get("cached_ms")),
    "ordinary MiB": lambda row: _mebi(row.get("ordinary_memory")),
    "cached MiB": lambda row: _mebi(row.get("cached_memory")),
    "tokens MiB": lambda row: _mebi(row.get("kept_bytes", {}).get("tokens")),
    "matrix MiB": lambda row: _mebi(row.get("kept_bytes", {}).get("matrix")),
    "bar": lambda row: _bar(row) if row.get("bar") else "",
}
