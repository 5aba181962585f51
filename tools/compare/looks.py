"""What rows that choose patches keep: controls, agreement with attention, pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.files import read_json
from lib.methods.registry import get_method
from lib.methods.served import has_patch_choice
from lib.retrieval.baselines import REPEATS
from lib.retrieval.bootstrap import paired_differences
from lib.retrieval.commands import Execute
from lib.retrieval.comparison import last_line
from lib.retrieval.outcome import AREAS
from lib.retrieval.result_files import read_ranks
from tools.compare.recipe import Looks
from tools.compare.runs import DATA_FLAGS, Planned, eval_command

PICTURES = "pictures"


@dataclass(frozen=True)
class Seen:
    """What one run's choice of patches is worth, on the same few images each time."""

    row: str
    rsum: dict[str, float]  # of the model's choice ("learned") and of each control
    areas: dict[str, dict[str, float]]  # by AREAS: the share kept, at random, and at best
    ranks: dict[str, Path]  # files with the rank of each query, by name as rsum


def chooses_patches(run: Planned) -> bool:
    """Return whether the run's method keeps some patches of each image and drops others."""
    drops = run.settings.get("sparse_ratio", 1.0) < 1
    return has_patch_choice(get_method(run.settings["method"])) and drops


def look(run: Planned, looks: Looks, drawn: bool, execute: Execute, show: Callable) -> str | None:
    """Measure and, where `drawn`, draw what is missing; return why it failed, None where not."""
    for control in (None, *looks.controls):
        if _entry(run, looks, control) is not None:
            continue
        command = [*eval_command(run, "test"), "--first_images", str(looks.images)]
        command += ["--selection_control", control] if control else ["--attention_kept", "1"]
        if execute(command, run.log, show):
            return f"{last_line(run.log)} ({run.log})"
    undrawn = _undrawn(run, looks) if drawn else []
    if undrawn and execute(picture_command(run, undrawn), run.log, show):
        return f"{last_line(run.log)} ({run.log})"
    return None


def picture_command(run: Planned, images: Sequence[str]) -> list[str]:
    """Return the command that draws the kept patches of test images beside the checkpoint."""
    command = [*run.python("-m", "tools.visualize"), "--out", str(run.folder / PICTURES)]
    for flag in DATA_FLAGS:
        known = flag not in ("workers", "feature_cache")
        if known and run.settings[flag] is not None:
            command += [f"--{flag}", str(run.settings[flag])]
    return [*command, "--image", *images]


def seen(run: Planned, looks: Looks) -> Seen | None:
    """Return what was measured of the run, None where a part is missing."""
    entries = {one or "learned": _entry(run, looks, one) for one in (None, *looks.controls)}
    if None in entries.values():
        return None
    rsum = {name: entry["rsum"] for name, entry in entries.items()}
    areas = {name: entries["learned"][name] for name in AREAS if entries["learned"].get(name)}
    ranks = {
        name: run.folder / entry["ranks"] for name, entry in entries.items() if "ranks" in entry
    }
    return Seen(run.row.name, rsum, areas, ranks)


def is_seen(run: Planned, looks: Looks, drawn: bool) -> bool:
    """Return whether all of it is measured and, where `drawn`, drawn."""
    return seen(run, looks) is not None and not (drawn and _undrawn(run, looks))


def looks_table(found: Sequence[Seen], looks: Looks) -> str:
    """Return the measurements as a markdown table, a line a row: means and spread over seeds."""
    areas = [name for name in AREAS if any(name in one.areas for one in found)]
    heads = ["row", f"rSum of {looks.images} images"]
    heads += [f"patches {one}" for one in looks.controls]
    for name in areas:
        heads += [f"{AREAS[name]} kept", "at random", "at best"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in dict.fromkeys(one.row for one in found):
        runs = [one for one in found if one.row == row]
        cells = [row, _spread([one.rsum["learned"] for one in runs], ".1f")]
        for control in looks.controls:
            cells.append(_difference(runs, control))
        for name in areas:
            for share in ("kept", "random", "best"):
                values = [one.areas[name][share] for one in runs if name in one.areas]
                cells.append(f"{statistics.mean(values):.3f}" if values else "–")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _spread(values: Sequence[float], form: str) -> str:
    """Return the mean and, of several runs, ± the standard deviation over them."""
    told = format(statistics.mean(values), form)
    return f"{told} ± {statistics.stdev(values):.1f}" if values[1:] else told


def _difference(runs: Sequence[Seen], control: str) -> str:
    """Return what the control adds: over seeds with their spread, of one run with its interval."""
    told = _spread([one.rsum[control] - one.rsum["learned"] for one in runs], "+.1f")
    files = runs[0].ranks
    if runs[1:] or not files.keys() >= {control, "learned"}:
        return told
    sides = [read_ranks(files[name]) for name in (control, "learned")]
    found = paired_differences(sides[:1], sides[1:], repeats=REPEATS)["rsum"]
    return f"{told} ({found.low:+.1f} to {found.high:+.1f})"


def _undrawn(run: Planned, looks: Looks) -> list[str]:
    folder = run.folder / PICTURES
    return [one for one in looks.drawn if not (folder / f"{one}_captions.png").exists()]


def _entry(run: Planned, looks: Looks, control: str | None) -> dict[str, Any] | None:
    results = read_json(run.folder / "results.json")
    end = f"_first{looks.images}" + (f"_{control}" if control else "")
    entries = [one for name, one in results.items() if name.endswith(end)]
    return next((one for one in entries if one.get("split") == "test"), None)
