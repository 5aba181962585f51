"""One run of a comparison: planned, trained or gone on with, evaluated, read."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import parse_train, train_parser
from lib.checkpoints.checkpoint import BEST, LAST, plain_arguments
from lib.errors import InputError
from lib.files import read_json, write_json
from lib.methods.encoder_flags import without_features
from lib.methods.registry import get_method
from lib.retrieval import comparison
from lib.retrieval.commands import Execute
from lib.retrieval.comparison import Row
from lib.retrieval.evaluation import find_table

ROOT = Path(__file__).resolve().parents[2]
STATE, LOG = "compare.json", "output.log"
# where the data lies and how it is read, by the trained flags
DATA_FLAGS = (
    "dataset data_path image_path f30k_img_path coco_img_path workers feature_cache".split()
)


@dataclass(frozen=True)
class Planned:
    """One run to come: its row and seed, its folder, train.py's flags and what they parse to."""

    row: Row
    seed: int
    folder: Path
    argv: list[str]
    settings: dict[str, Any]
    trial: str = ""  # of tuning

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.seed}" + (f", {self.trial}" if self.trial else "")

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def state(self) -> dict[str, Any]:
        """Return what is known of the run so far: trained, seconds, parameters, machine."""
        return read_json(self.folder / STATE)

    def keep(self, state: dict[str, Any]) -> None:
        """Write what is known of the run."""
        write_json(self.folder / STATE, state)

    def tables(self, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the entries of results.json, by split, of the splits that are evaluated."""
        results = read_json(self.folder / "results.json")
        found = {one: find_table(results, self.settings["dataset"], one) for one in splits}
        return {split: table for split, table in found.items() if table and "rsum" in table}

    def python(self, *words: str) -> list[str]:
        """Return the command of a program of this repository, given the best checkpoint."""
        return [sys.executable, *words, "--checkpoint", str(self.folder / BEST)]


def plan_run(row: Row, seed: int, flags: Sequence[str], out: Path) -> Planned:
    """Return a run to come. Raises InputError for flags that train.py would refuse."""
    folder = out / row.name / f"seed{seed}"
    own = [
        str(out / flag[1:] / f"seed{seed}" / BEST) if flag.startswith("@") else flag
        for flag in row.flags
    ]
    argv = [*flags, *own, "--seed", str(seed), "--logger_name", str(folder)]
    try:
        asked = train_parser().parse_known_args(argv)[0]
        method = get_method(asked.method) if asked.method else None
        if method and asked.feature_cache and without_features(method, asked.precomp):
            argv.append("--feature_cache=")  # what others read is nothing to it
        return Planned(row, seed, folder, argv, plain_arguments(parse_train(argv)))
    except InputError as error:
        raise InputError(f"row {row.name}: {error}") from None


def train_once(run: Planned, execute: Execute, show: Callable) -> str | None:
    """Train the run, or go on with it; return why it failed, None where not or where it is done."""
    state = run.state
    if state.get("trained"):
        return None
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "results.json").unlink(missing_ok=True)  # of an earlier checkpoint
    if _train(run, state, execute, show) != 0:
        return f"{comparison.last_line(run.log)} ({run.log})"
    run.keep({**state, "trained": True})
    (run.folder / LAST).unlink(missing_ok=True)  # two thirds of a run's bytes, read by nobody now
    return None


def _train(run: Planned, state: dict[str, Any], execute: Execute, show: Callable) -> int:
    """Start the run, or go on with it from its last checkpoint; return train.py's exit code.

    The wall time adds up over resumptions in `state`, which lies on disk at each tick.
    """
    argv, before = run.argv, 0.0
    if (run.folder / LAST).exists():
        argv, before = ["--resume", str(run.folder)], state.get("train_seconds", 0.0)
    elif (run.folder / "args.json").exists():  # stopped before its first checkpoint
        argv = [*argv, "--overwrite", "1"]
    started = time.perf_counter()

    def keep() -> None:
        state["train_seconds"] = round(before + time.perf_counter() - started, 2)
        run.keep(state)

    def tick() -> None:
        keep()
        show()

    try:
        return execute([sys.executable, str(ROOT / "train.py"), *argv], run.log, tick)
    finally:
        keep()


def eval_command(run: Planned, split: str) -> list[str]:
    """Return the command that evaluates the dev-chosen checkpoint; data flags as in training."""
    command = [*run.python(str(ROOT / "eval.py")), "--split", split]
    for flag in DATA_FLAGS:
        if run.settings[flag] not in (None, ""):
            command += [f"--{flag}", str(run.settings[flag])]
    return [*command, "--gpu-id", str(run.settings["gpu_id"])]


def flag_words(text: str, taken: Sequence[str]) -> list[str]:
    """Return the words of --train. Raises InputError for flags that a comparison sets itself."""
    try:
        words = shlex.split(text)
    except ValueError as error:  # a quotation that is not closed
        raise InputError(f"--train {text}: {error}") from None
    clash = [word for word in words if word.split("=")[0] in taken]
    if clash:
        raise InputError(f"--train {clash[0]}: this tool sets that flag itself; leave it out")
    return words


def refuse_changed(run: Planned) -> None:
    """Raise InputError where the run's folder holds one that was made with other settings."""
    changed = changes(run)
    if changed:
        told = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if changed[3:] else "")
        raise InputError(
            f"{run.folder} holds a run with other settings ({told}): give those settings again, "
            "delete the folder, or choose another --out"
        )


def changes(run: Planned) -> list[str]:
    """Return how the run in the folder, if there is one, differs from the plan."""
    path = run.folder / "args.json"
    if not path.exists():
        return []
    saved = read_json(path)
    if not saved:
        return ["args.json is not readable"]
    row_defaults = ["--dataset", run.settings["dataset"], "--method", run.settings["method"]]
    defaults = plain_arguments(parse_train(row_defaults))
    return comparison.changed_settings(run.settings, saved, defaults)
