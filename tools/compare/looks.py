"""What rows that choose patches keep: controls, agreement with attention, pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lib.files import read_json
from lib.methods.base import Method
from lib.methods.registry import get_method
from lib.retrieval.commands import Execute
from lib.retrieval.comparison import last_line
from tools.compare.recipe import Looks
from tools.compare.runs import DATA_FLAGS, Planned, eval_command

PICTURES = "pictures"


@dataclass(frozen=True)
class Seen:
    """What one run's choice of patches is worth, on the same few images each time."""

    row: str
    rsum: dict[str, float]  # of the model's choice ("learned") and of each control
    attention: dict[str, float]  # share of [CLS] attention kept, at random, and at best


def chooses_patches(run: Planned) -> bool:
    """Return whether the run's method keeps some patches of each image and drops others."""
    method = get_method(run.settings["method"])
    drops = run.settings.get("sparse_ratio", 1.0) < 1
    return method.patch_choice is not Method.patch_choice and drops


def look(run: Planned, looks: Looks, execute: Execute, show: Callable) -> str | None:
    """Measure and draw what is still missing; return why it failed, None where not."""
    for control in (None, *looks.controls):
        if _entry(run, looks, control) is not None:
            continue
        command = [*eval_command(run, "test"), "--first_images", str(looks.images)]
        command += ["--selection_control", control] if control else ["--attention_kept", "1"]
        if execute(command, run.log, show):
            return f"{last_line(run.log)} ({run.log})"
    undrawn = _undrawn(run, looks)
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
    return Seen(run.row.name, rsum, entries["learned"].get("attention_kept") or {})


def is_seen(run: Planned, looks: Looks) -> bool:
    """Return whether all of it is measured and drawn."""
    return seen(run, looks) is not None and not _undrawn(run, looks)


def looks_table(found: Sequence[Seen], looks: Looks) -> str:
    """Return the measurements as a markdown table, a line a row."""
    heads = ["row", f"rSum of {looks.images} images"]
    heads += [f"patches {one}" for one in looks.controls]
    heads += ["[CLS] attention kept", "at random", "at best"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for one in found:
        cells = [one.row, f"{one.rsum['learned']:.1f}"]
        cells += [f"{one.rsum[name] - one.rsum['learned']:+.1f}" for name in looks.controls]
        shares = (one.attention.get(name) for name in ("kept", "random", "best"))
        lines.append([*cells, *("–" if share is None else f"{share:.3f}" for share in shares)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _undrawn(run: Planned, looks: Looks) -> list[str]:
    folder = run.folder / PICTURES
    return [one for one in looks.drawn if not (folder / f"{one}_captions.png").exists()]


def _entry(run: Planned, looks: Looks, control: str | None) -> dict[str, Any] | None:
    results = read_json(run.folder / "results.json")
    end = f"_first{looks.images}" + (f"_{control}" if control else "")
    entries = [one for name, one in results.items() if name.endswith(end)]
    return next((one for one in entries if one.get("split") == "test"), None)
