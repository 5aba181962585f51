"""Train and evaluate every method alike: python -m tools.compare --dataset scenes.

Each run lies in OUT/ROW/seedK; the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arguments import parse_train
from lib.checkpoints.checkpoint import BEST, LAST, load_model, plain_arguments
from lib.errors import InputError
from lib.files import read_json, write_json, write_text_whole
from lib.flags import IntegerList, Parser
from lib.program import printable_streams
from lib.retrieval import comparison
from lib.retrieval.baselines import against_baselines, against_cells, tested_facts, told_lines
from lib.retrieval.commands import Execute, executor, locked, runs_bar, signals_as_interrupt
from lib.retrieval.comparison import FinishedRun, Row, last_line
from lib.retrieval.evaluation import find_table
from tools.compare_rows import pick_rows, rows_of

ROOT = Path(__file__).resolve().parent.parent
STATE, LOG = "compare.json", "output.log"
OURS = ("--method", "--dataset", "--seed", "--logger_name", "--resume", "--overwrite")


@dataclass(frozen=True)
class Kind:
    """A comparison of methods, or the ablations: what is shown, and what ranks the rows."""

    title: str
    out: str
    splits: tuple[str, ...]
    ranked_on: str
    recalls: bool


METHODS_KIND = Kind("Methods compared", "runs/compare", ("test",), "test", True)
ABLATIONS_KIND = Kind("Ablations of SEPS", "runs/ablations", ("dev", "test"), "dev", False)


@dataclass(frozen=True)
class Planned:
    """One run to come: its row and seed, its folder, train.py's flags and what they parse to."""

    row: Row
    seed: int
    folder: Path
    argv: list[str]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.seed}"

    def tables(self, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the entries of results.json, by split, of the splits that are evaluated."""
        results = read_json(self.folder / "results.json")
        found = {one: find_table(results, self.settings["dataset"], one) for one in splits}
        return {split: table for split, table in found.items() if table and "rsum" in table}


def main(
    argv: Sequence[str] | None = None,
    execute: Execute | None = None,
    count_parameters: Callable[[Path], int] | None = None,
) -> int:
    """Compare as the flags say; return the exit code.

    0: all runs finished, 1: a run failed, 2: bad input, 130: a signal stopped it. `execute` runs a
    command into a log file and `count_parameters` reads a checkpoint; others may take their place.
    """
    printable_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(argv)
        with signals_as_interrupt():
            comparing = Comparison(args, argv, execute, count_parameters or _count_parameters)
            return comparing.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; give the same command again to go on", file=sys.stderr)
        return 1
    except SystemExit as error:  # of --help
        return error.code
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = Parser("tools.compare", description=__doc__, raises=True)
    parser.add_argument("--dataset", default="scenes", metavar="NAME", help="as in train.py")
    parser.add_argument("--ablations", action="store_true", help="variants of seps, ranked on dev")
    parser.add_argument("--rows", default=None, help="rows to run, e.g. seps,laps; default: all")
    parser.add_argument("--seeds", action=IntegerList, default=[0, 1, 2], help="of each row")
    parser.add_argument("--epochs", type=int, default=None, help="--num_epochs of every run")
    parser.add_argument(
        "--train",
        default="",
        metavar="FLAGS",
        help='train.py flags of every run, in one word: --train="--batch_size 32"',
    )
    parser.add_argument(
        "--out", default=None, help="default: runs/compare, runs/ablations with --ablations"
    )
    return parser


def train_flags(args: argparse.Namespace) -> list[str]:
    """Return the train.py flags of every run. Raises InputError for flags this tool sets itself."""
    extra = shlex.split(args.train)
    taken = [word for word in extra if word.split("=")[0] in OURS]
    if taken:
        raise InputError(f"--train {taken[0]}: this tool sets that flag itself; leave it out")
    epochs = [] if args.epochs is None else ["--num_epochs", str(args.epochs)]
    return ["--dataset", args.dataset, *extra, *epochs]


def plan_run(row: Row, seed: int, flags: Sequence[str], out: Path) -> Planned:
    """Return a run to come. Raises InputError for flags that train.py would refuse."""
    folder = out / row.name / f"seed{seed}"
    own = [
        str(out / flag[1:] / f"seed{seed}" / BEST) if flag.startswith("@") else flag
        for flag in row.flags
    ]
    argv = [*flags, *own, "--seed", str(seed), "--logger_name", str(folder)]
    try:
        return Planned(row, seed, folder, argv, plain_arguments(parse_train(argv)))
    except InputError as error:
        raise InputError(f"row {row.name}: {error}") from None


class Comparison:
    """The runs of one command: which are finished, running the others, writing the page."""

    def __init__(
        self,
        args: argparse.Namespace,
        argv: Sequence[str],
        execute: Execute | None,
        count_parameters: Callable[[Path], int],
    ) -> None:
        self.kind = ABLATIONS_KIND if args.ablations else METHODS_KIND
        self.out = Path(args.out or self.kind.out)
        self.command = shlex.join(["python", "-m", "tools.compare", *argv])
        self.dataset = args.dataset
        seeds = list(dict.fromkeys(args.seeds))
        if not seeds:
            raise InputError("--seeds: give at least one number, e.g. --seeds 0,1,2")
        rows, flags = rows_of(args), train_flags(args)
        picked = pick_rows(rows, args.rows)
        # all rows of a seed before the next seed, so that an early stop leaves a comparison
        self.runs = [plan_run(row, seed, flags, self.out) for seed in seeds for row in picked]
        for run in self.runs:
            refuse_changed(run)
        self.others: list[Planned] = []  # rows not picked now, shown where they agree
        for row in (one for one in rows if one not in picked):
            with contextlib.suppress(InputError):
                self.others += [plan_run(row, seed, flags, self.out) for seed in seeds]
        self.execute = execute
        self.count_parameters = count_parameters
        self.machine = comparison.machine_name(_gpu_name(self.runs[0].settings["gpu_id"]))
        self.failures: dict[str, str] = {}
        self.differences: list[str] = []

    def run(self) -> int:
        """Run what is not finished, rewriting the page after each; return the exit code, 0 or 1."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            comparison.require_matplotlib()
        except InputError as error:
            print(error, file=sys.stderr)
        with locked(self.out) as lock:
            execute = self.execute or executor(lock)
            waiting = [run for run in self.runs if self.finished(run) is None]
            self.write_page()
            done = len(self.runs) - len(waiting)
            with runs_bar(total=len(self.runs), done=done) as bar:
                for number, run in enumerate(waiting):
                    self._run_one(run, len(waiting) - number, bar, execute)
        for name, reason in self.failures.items():
            print(f"{name} failed: {reason}", file=sys.stderr)
        for line in self.differences:
            print(line)
        print(f"written to {self.out / 'README.md'}")
        return 1 if self.failures else 0

    def _run_one(self, run: Planned, left: int, bar: tqdm, execute: Execute) -> None:
        bar.set_description(run.name, refresh=False)
        known = [one.seconds for one in map(self.finished, self.runs) if one is not None]
        started = time.perf_counter()

        def show() -> None:
            rest = "?"
            if known:
                seconds = left * sum(known) / len(known) - (time.perf_counter() - started)
                rest = comparison.format_seconds(max(0.0, seconds))
            bar.set_postfix_str(f"{rest} left")

        show()
        failure = self.carry_out(run, execute, show)
        if failure is not None:
            self.failures[run.name] = failure
            bar.write(f"{run.name} failed: {failure}", file=sys.stderr)
        bar.update(1)
        self.write_page()

    def carry_out(self, run: Planned, execute: Execute, show: Callable) -> str | None:
        """Train, or go on with training, then evaluate; return why it failed, None where not."""
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / LOG
        state = read_json(run.folder / STATE)
        if not state.get("trained"):
            (run.folder / "results.json").unlink(missing_ok=True)  # of an earlier checkpoint
            if train(run, state, execute, show) != 0:
                return f"{last_line(log)} ({log})"
            state |= {"trained": True, "machine": self.machine}
            write_json(run.folder / STATE, state)
        if "parameters" not in state:
            try:
                state["parameters"] = self.count_parameters(run.folder / BEST)
            except InputError as error:
                return str(error)
            write_json(run.folder / STATE, state)
        for split in self.kind.splits:
            if not self._has_table(run, split) and execute(eval_command(run, split), log, show):
                return f"{last_line(log)} ({log})"
            if not self._has_table(run, split):
                return f"eval.py wrote no results of {split} ({log})"
        return None

    def _has_table(self, run: Planned, split: str) -> bool:
        return bool(run.tables([split]))

    def finished(self, run: Planned) -> FinishedRun | None:
        """Return what the run measured, None where it is not trained and evaluated."""
        state = read_json(run.folder / STATE)
        if not state.get("trained") or "parameters" not in state:
            return None
        tables = run.tables(self.kind.splits)
        if len(tables) < len(self.kind.splits):
            return None
        return FinishedRun(
            row=run.row,
            seed=run.seed,
            tables=tables,
            parameters=state["parameters"],
            seconds=state["train_seconds"],
            machine=state["machine"],
            folder=run.folder,
        )

    def write_page(self) -> None:
        """Write README.md and the chart from what is on disk.

        Rows that were not picked now are shown too where their runs had the same settings.
        """
        same = [*self.runs, *(run for run in self.others if not _changed(run))]
        found = {run.name: self.finished(run) for run in same}
        runs = [one for one in found.values() if one is not None]
        groups = comparison.by_protocol(comparison.summarize(runs), self.kind.ranked_on)
        against = against_baselines(groups, runs, self.kind.ranked_on)
        self.differences = told_lines(against)
        title = f"{self.kind.title} on {self.dataset}"
        chart = self._chart(groups, title)
        open_runs = [
            f"{run.name}: {self.failures.get(run.name, 'waiting')}"
            for run in self.runs
            if found[run.name] is None
        ]
        page = comparison.report_page(
            title,
            [*self._facts(runs), *tested_facts(against)],
            groups,
            open_runs,
            chart,
            self.kind.splits,
            self.kind.recalls,
            against_cells(against),
        )
        write_text_whole(self.out / "README.md", page)

    def _chart(self, groups: dict, title: str) -> str | None:
        if not groups:
            return None
        try:
            comparison.draw_chart(groups, self.out / "rsum.png", title, self.kind.ranked_on)
        except InputError:
            return None  # no matplotlib, said at the start
        return "rsum.png"

    def _facts(self, runs: Sequence[FinishedRun]) -> list[str]:
        machines = sorted({one.machine for one in runs}) or [self.machine]
        chosen = sorted({one.tables["test"]["val_split"] for one in runs}) or ["dev"]
        facts = [
            f"Command: `{self.command}`",
            f"Written {datetime.now().strftime('%Y-%m-%d %H:%M')}",
            f"Machine: {'; '.join(machines)}",
            f"Checkpoints chosen on {', '.join(chosen)}; recalls are those of test, in percent",
            "rSum: mean ± standard deviation over seeds; training: mean wall time of train.py, "
            "start-up and validation included",
            f"Rows are ranked on {self.kind.ranked_on} within their protocol; rows of different "
            "protocols answer different questions",
        ]
        if len(machines) > 1:
            facts.append("Runs come from several machines: their training times don't compare")
        return facts


# --- one run -----------------------------------------------------------------------------------


def train(run: Planned, state: dict[str, Any], execute: Execute, show: Callable) -> int:
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
        write_json(run.folder / STATE, state)

    def tick() -> None:
        keep()
        show()

    try:
        return execute([sys.executable, str(ROOT / "train.py"), *argv], run.folder / LOG, tick)
    finally:
        keep()


def eval_command(run: Planned, split: str) -> list[str]:
    """Return the command that evaluates the dev-chosen checkpoint; data flags as in training."""
    command = [sys.executable, str(ROOT / "eval.py"), "--checkpoint", str(run.folder / BEST)]
    command += ["--split", split]
    for flag in "dataset data_path image_path f30k_img_path coco_img_path workers".split():
        if run.settings[flag] is not None:
            command += [f"--{flag}", str(run.settings[flag])]
    return [*command, "--gpu-id", str(run.settings["gpu_id"])]


def refuse_changed(run: Planned) -> None:
    """Raise InputError where the run's folder holds one that was made with other settings."""
    changed = _changed(run)
    if changed:
        told = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if changed[3:] else "")
        raise InputError(
            f"{run.folder} holds a run with other settings ({told}): give those settings again, "
            "delete the folder, or choose another --out"
        )


def _changed(run: Planned) -> list[str]:
    path = run.folder / "args.json"
    if not path.exists():
        return []
    saved = read_json(path)
    if not saved:
        return ["args.json is not readable"]
    row_defaults = ["--dataset", run.settings["dataset"], "--method", run.settings["method"]]
    defaults = plain_arguments(parse_train(row_defaults))
    return comparison.changed_settings(run.settings, saved, defaults)


def _count_parameters(checkpoint: Path) -> int:
    model, _ = load_model(checkpoint)
    return sum(one.numel() for one in model.parameters())


def _gpu_name(number: int) -> str | None:
    known = torch.cuda.is_available() and number < torch.cuda.device_count()
    return torch.cuda.get_device_name(number) if known else None


if __name__ == "__main__":
    sys.exit(main())
