"""Results -> the plain-text tables that a terminal shows, 80 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.retrieval.metrics import DIRECTIONS, RECALL_AT, recall_depths
from lib.retrieval.protocol import ORACLE_LINE

TABLE_WIDTH = 80
COLUMN = 7
WIDEST = (TABLE_WIDTH - 8) // COLUMN  # columns that leave a name some room


def format_table(
    results: Mapping[str, Mapping[str, Any]], recall_at: Sequence[int] = RECALL_AT
) -> str:
    """Return a plain-text table, at most 80 columns wide, with one row per split or model.

    results: name -> what `recall_metrics` or `fold_metrics` returned; of further keys "protocol"
    is read: rows of the oracle protocol come last, below a line that says why. Columns: I2T and
    T2I R@1, R@5, R@10 and those of `recall_at` in percent, and rSum; where they do not fit beside
    each other each direction has a table of its own. A name too long for the line is cut and ends
    in "…".
    """
    depths = recall_depths(recall_at)
    columns = [(way, k) for way in DIRECTIONS for k in depths]
    if len(columns) + 1 <= WIDEST:
        return _block(results, columns)
    fits = WIDEST - 1
    blocks = [
        [(way, k) for k in depths[first : first + fits]]
        for way in DIRECTIONS
        for first in range(0, len(depths), fits)
    ]
    return "\n\n".join(_block(results, block) for block in blocks)


def _block(results: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, int]]) -> str:
    room = TABLE_WIDTH - COLUMN * (len(columns) + 1)
    names = {split: split if len(split) <= room else split[: room - 1] + "…" for split in results}
    width = max(map(len, ["split", *names.values()]))
    ways = dict.fromkeys(way for way, _ in columns)
    spans = {way: COLUMN * sum(one == way for one, _ in columns) for way in ways}
    heads = "".join(f"{way.upper():>{span}}" for way, span in spans.items())
    lines = [
        f"{'':{width}}{heads}",
        f"{'split':{width}}" + "".join(f"{f'R@{k}':>{COLUMN}}" for _, k in columns) + "   rSum",
    ]
    lines.append("-" * len(lines[-1]))
    oracle = {split for split, one in results.items() if one.get("protocol") == "oracle"}
    for split in sorted(results, key=oracle.__contains__):  # stable: the order stays otherwise
        if split in oracle and ORACLE_LINE not in lines:
            lines.append(ORACLE_LINE)
        values = [results[split][way][f"r{k}"] for way, k in columns]
        row = "".join(f"{value:{COLUMN}.1f}" for value in [*values, results[split]["rsum"]])
        lines.append(f"{names[split]:{width}}{row}")
    return "\n".join(lines)
