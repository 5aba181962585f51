"""Two results compared: paired differences per recall, a table and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.errors import InputError
from lib.retrieval.bootstrap import Difference, paired_differences
from lib.retrieval.metrics import RECALL_AT
from lib.retrieval.result_files import StoredResult

Runs = Sequence[Mapping[str, StoredResult]]  # a run a seed, its results by entry
WIDTH = 80


@dataclass(frozen=True)
class Compared:
    """The differences of one entry between two results, and what they were computed from."""

    name: str
    differences: dict[str, Difference]
    seeds: tuple[int, int]
    images: int
    captions: int
    protocols: tuple[str, str]
    methods: tuple[str, str]
    level: float


def compare_results(
    a: Runs,
    b: Runs,
    table: str | None = None,
    table_b: str | None = None,
    *,
    repeats: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Compared]:
    """Return what differs between two results in `table`, or in each entry that all runs have.

    With `table_b` A's entry `table` is compared with that one of B: an ensemble's with a member's,
    the model's own with a control's. Entries of controls, which say what a model is without its
    choice, are compared where asked. Raises InputError where they share none, rank other images or
    captions, mix protocols within a side, or where one side's queries carried text made from their
    answers and the other's did not.
    """
    if repeats < 100 or not 0 < level < 1:
        raise InputError(
            f"--repeats {repeats}, --level {100 * level:g}: give at least 100 draws and a level "
            "between 0 and 100"
        )
    options = {"repeats": repeats, "seed": seed, "level": level}
    return [
        _compare([run[one] for run in a], [run[other] for run in b], options)
        for one, other in _entries_compared(a, b, table, table_b)
    ]


def _entries_compared(
    a: Runs, b: Runs, table: str | None, table_b: str | None
) -> list[tuple[str, str]]:
    """Return the names of the entries of A and of B; InputError where there are none."""
    if table_b is not None:
        if table is None:
            raise InputError(f"--table_b {table_b}: name A's entry too, with --table")
        for flag, runs, name in (("table", a, table), ("table_b", b, table_b)):
            if any(name not in run for run in runs):
                raise InputError(f"--{flag} {name}: the entries there are {_entries(runs)}")
        return [(table, table_b)]
    shared = [name for name in a[0] if all(name in run for run in [*a, *b])]
    if table is None:
        names = [name for name in shared if "selection_control" not in a[0][name].facts]
    else:
        names = [name for name in shared if name == table]
    if not names:
        wanted = f"--table {table}: " if table else ""
        but = " but those of controls (--table NAME)" if shared and table is None else ""
        raise InputError(
            f"{wanted}the two results share no entry{but}: {_entries(a)} and {_entries(b)}; "
            "--table NAME --table_b NAME compares two of different names"
        )
    return [(name, name) for name in names]


def _entries(runs: Runs) -> str:
    return ", ".join(sorted({name for run in runs for name in run}))


def _compare(
    a: Sequence[StoredResult], b: Sequence[StoredResult], options: Mapping[str, Any]
) -> Compared:
    protocols = _only(a, "protocol"), _only(b, "protocol")
    if protocols[0] != protocols[1] and "oracle" in protocols:
        raise InputError(
            f"{a[0].folder} is of protocol {protocols[0]}, {b[0].folder} of {protocols[1]}: oracle "
            "queries carried text made from their own answers, so the two are not comparable"
        )
    _require_same_data([*a, *b])
    try:
        found = paired_differences(
            [one.ranks for one in a], [one.ranks for one in b], RECALL_AT, **options
        )
    except ValueError as error:
        raise InputError(f"{a[0].folder} and {b[0].folder}, {a[0].name}: {error}") from None
    return Compared(
        name=" and ".join(dict.fromkeys((a[0].name, b[0].name))),
        differences=found,
        seeds=(len(a), len(b)),
        images=len(a[0].ranks.i2t),
        captions=len(a[0].ranks.t2i),
        protocols=protocols,
        methods=(_only(a, "method"), _only(b, "method")),
        level=options["level"],
    )


def _only(runs: Sequence[StoredResult], fact: str) -> str:
    values = sorted({str(one.facts.get(fact, "unknown")) for one in runs})
    if len(values) > 1:
        raise InputError(
            f"{runs[0].folder.parent} mixes results of {fact} {' and '.join(values)}: compare "
            "folders that differ in nothing but the seed"
        )
    return values[0]


def _require_same_data(runs: Sequence[StoredResult]) -> None:
    """Raise InputError where two results were measured on captions or ids that differ."""
    first = runs[0].facts.get("data") or {}
    for other in runs[1:]:
        data = other.facts.get("data") or {}
        for digest in ("captions_sha256", "ids_sha256"):
            known = first.get(digest), data.get(digest)
            if None not in known and known[0] != known[1]:
                raise InputError(
                    f"{runs[0].folder} and {other.folder} were not measured on the same data "
                    f"({digest} differs): evaluate both on one data set"
                )


# --- told --------------------------------------------------------------------------------------


def format_comparison(one: Compared, a: str, b: str) -> str:
    """Return the table of differences and the sentence, at most 80 columns wide."""
    lines = [
        f"{one.name}: {one.images:,} images, {one.captions:,} captions, protocol "
        + " and ".join(dict.fromkeys(one.protocols)),
        f"A  {_side(a, one.methods[0], one.seeds[0])}",
        f"B  {_side(b, one.methods[1], one.seeds[1])}",
    ]
    if one.protocols[0] != one.protocols[1]:
        lines.append("The protocols differ: image reads dense texts that none does without.")
    interval = f"{100 * one.level:g} % interval"
    head = f"{'':10}{'A':>8}{'B':>8}{'A - B':>9}{interval:>20}{'p':>9}"
    lines += [head, "-" * len(head)]
    for name, found in one.differences.items():
        bounds = f"{found.low:+.2f} to {found.high:+.2f}"
        lines.append(
            f"{_title(name):10}{found.a:8.2f}{found.b:8.2f}{found.mean:+9.2f}{bounds:>20}"
            f"{found.p:9.4f}"
        )
    return "\n".join([*lines, sentence(one)])


def sentence(one: Compared) -> str:
    """Return in words what the rSum says, and what it was drawn over."""
    rsum = one.differences["rsum"]
    interval = f"{100 * one.level:g} % interval {rsum.low:+.1f} to {rsum.high:+.1f}"
    better, worse = ("A", "B") if rsum.mean > 0 else ("B", "A")
    if rsum.is_shown:
        told = f"{better} is better than {worse} by {abs(rsum.mean):.1f} rSum ({interval})."
    else:
        told = f"No difference in rSum is shown ({interval} holds 0)."
    drawn = "images and seeds" if max(one.seeds) > 1 else "images"
    alone = [side for side, seeds in zip("AB", one.seeds, strict=True) if seeds == 1]
    if alone:
        verb = "are" if len(alone) > 1 else "is"
        return (
            f"{told}\nDrawn over {drawn}; {' and '.join(alone)} {verb} of one seed: another seed "
            "may say otherwise."
        )
    return f"{told}\nDrawn over {drawn}."


def _side(folder: str, method: str, seeds: int) -> str:
    told = f" ({method}, {seeds} seed{'s' if seeds > 1 else ''})"
    room = WIDTH - 3 - len(told)
    shown = folder if len(folder) <= room else "…" + folder[-room + 1 :]
    return shown + told


def _title(name: str) -> str:
    if name == "rsum":
        return "rSum"
    way, depth = name.split("_r")
    return f"{way.upper()} R@{depth}"
