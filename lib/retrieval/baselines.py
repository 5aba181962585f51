"""Each row of a comparison against its protocol's best baseline, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lib.errors import InputError
from lib.retrieval.bootstrap import Difference, holm, mean_interval, paired_differences
from lib.retrieval.comparison import FinishedRun, Summary
from lib.retrieval.metrics import QueryRanks
from lib.retrieval.result_files import read_ranks

REPEATS = 2000  # draws of a difference: the page is written anew after each run


@dataclass(frozen=True)
class Against:
    """A row's difference in rSum to the best baseline of its protocol."""

    protocol: str
    row: str
    baseline: str
    rsum: Difference
    p: float  # after Holm's correction


def against_baselines(
    groups: Mapping[str, Sequence[Summary]],
    runs: Sequence[FinishedRun],
    split: str,
    named: str | None = None,
) -> list[Against]:
    """Return how each row differs on `split` from its protocol's best baseline.

    `named` is a row that all are compared with in its place, whatever their protocol; but oracles
    with oracles alone. Rows are as `by_protocol` ranks them; rows without per-query ranks, or whose
    ranks are of other queries, are left out, and so is a protocol that has no baseline. The p
    values are corrected (Holm 1979) over all rows returned.
    """
    found: list[tuple[str, str, str, Difference]] = []
    for protocol, group in groups.items():
        best, home = _baseline(groups, protocol, named)
        if best is None:
            continue
        base = _ranks_of(runs, best, home, split)
        for one in group:
            ranks = _ranks_of(runs, one.row.name, protocol, split)
            if one.row.name == best or not base or not ranks:
                continue
            try:
                rsum = paired_differences(ranks, base, repeats=REPEATS)["rsum"]
            except ValueError:  # of other images or captions
                continue
            found.append((protocol, one.row.name, best, rsum))
    corrected = holm([rsum.p for *_, rsum in found])
    return [Against(*one, p) for one, p in zip(found, corrected, strict=True)]


def _baseline(
    groups: Mapping[str, Sequence[Summary]], protocol: str, named: str | None
) -> tuple[str | None, str]:
    """Return the row that a protocol's rows are compared with, and the protocol of that row."""
    if named is None:
        best = next((one.row.name for one in groups[protocol] if one.row.baseline), None)
        return best, protocol
    for home, group in groups.items():
        if (home == "oracle") == (protocol == "oracle") and named in (
            one.row.name for one in group
        ):
            return named, home
    return None, protocol


def intervals_of(runs: Sequence[FinishedRun], split: str) -> dict[tuple[str, str], str]:
    """Return the 95 % interval of each row's mean rSum, by protocol and row."""
    found = {}
    for protocol, row in dict.fromkeys((run.protocol, run.row.name) for run in runs):
        ranks = _ranks_of(runs, row, protocol, split)
        if ranks:
            with suppress(ValueError):  # seeds that ranked other images or captions have none
                low, high = mean_interval(ranks, repeats=REPEATS)
                found[protocol, row] = f"{low:.1f} to {high:.1f}"
    return found


def against_cells(against: Sequence[Against]) -> dict[str, dict[str, str]]:
    """Return by protocol the table cell of each row, the baseline's own among them."""
    cells: dict[str, dict[str, str]] = {}
    for one in against:
        told = cells.setdefault(one.protocol, {one.baseline: "baseline"})
        told[one.row] = f"{_interval(one)}, p = {one.p:.3f}"
    return cells


def told_lines(against: Sequence[Against]) -> list[str]:
    """Return a line a row for the terminal, at most 80 columns for names of usual length."""
    return [
        f"{one.row} - {one.baseline} ({one.protocol}): rSum {_interval(one)}, p = {one.p:.3f}"
        for one in against
    ]


def differences_facts(against: Sequence[Against], named: str | None = None) -> list[str]:
    """Return what the page says of these differences; nothing where there are none."""
    if not against:
        return []
    base = f"row {named}" if named else "the best baseline of a protocol"
    return [
        f"Differences to {base}: paired bootstrap over images and seeds, "
        f"{REPEATS:,} draws, 95 % intervals; p after Holm's correction over {len(against)} rows"
    ]


def _ranks_of(runs: Sequence[FinishedRun], row: str, protocol: str, split: str) -> list[QueryRanks]:
    """Return the ranks of every run of a row; none where one of them has none."""
    chosen = [run for run in runs if run.row.name == row and run.protocol == protocol]
    try:
        return [read_ranks(run.folder / run.tables[split]["ranks"]) for run in chosen]
    except (InputError, KeyError, TypeError):  # results of before there were ranks
        return []


def _interval(one: Against) -> str:
    return f"{one.rsum.mean:+.1f} ({one.rsum.low:+.1f} to {one.rsum.high:+.1f})"
