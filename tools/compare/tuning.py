"""What is tuned on dev before a comparison: the same trials for each row, the best one taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lib.checkpoints.checkpoint import BEST
from lib.checkpoints.payloads import read_payload
from lib.retrieval.comparison import Row
from tools.compare.recipe import Tuning
from tools.compare.runs import Planned, plan_run

FOLDER = "tuning"


def plan_trials(
    tuning: Tuning, rows: Sequence[Row], flags: Sequence[str], out: Path
) -> dict[tuple[str, str], Planned]:
    """Return a run for each row and trial, by both names; a row's own flags win over all."""
    return {
        (row.name, trial): replace(
            plan_run(row, tuning.seed, told, out / FOLDER / trial), trial=trial
        )
        for trial, words in tuning.trials.items()
        for told in ([*flags, *tuning.flags, *words],)
        for row in rows
    }


def dev_rsum(run: Planned) -> float | None:
    """Return the best rSum that the run has reached on dev, None where it is not trained."""
    state = run.state
    if not state.get("trained"):
        return None
    if "dev_rsum" not in state:
        state["dev_rsum"] = float(read_payload(run.folder / BEST)["best_rsum"])
        run.keep(state)
    return state["dev_rsum"]


def tuned(
    tuning: Tuning, rows: Sequence[Row], found: Mapping[tuple[str, str], float | None]
) -> list[Row]:
    """Return the rows with the flags of their best trial; those with a trial to come are left out.

    Of equal trials the first is taken.
    """
    chosen = []
    for row in rows:
        values = {trial: found[row.name, trial] for trial in tuning.trials}
        if None not in values.values():
            best = max(values, key=lambda trial: values[trial])
            chosen.append(replace(row, flags=(*tuning.trials[best], *row.flags)))
    return chosen


def trials_table(
    tuning: Tuning, rows: Sequence[Row], found: Mapping[tuple[str, str], float | None]
) -> str:
    """Return the dev rSum of each row's trials as a markdown table, the best one bold."""
    heads = ["row", *(f"`{' '.join(words) or name}`" for name, words in tuning.trials.items())]
    lines = [heads, ["---"] + ["---:"] * len(tuning.trials)]
    for row in rows:
        values = [found[row.name, trial] for trial in tuning.trials]
        best = max((one for one in values if one is not None), default=None)
        cells = ["–" if one is None else f"{one:.1f}" for one in values]
        if best is not None:
            place = values.index(best)
            cells[place] = f"**{cells[place]}**"
        lines.append([row.name, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
