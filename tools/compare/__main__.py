"""Train and evaluate every method alike: python -m tools.compare --dataset scenes.

Each run lies in OUT/ROW/seedK; the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from lib.checkpoints.checkpoint import BEST, load_model
from lib.errors import InputError
from lib.files import write_text_whole
from lib.flags import IntegerList, Parser
from lib.program import printable_streams
from lib.retrieval import comparison
from lib.retrieval.baselines import (
    against_baselines,
    against_cells,
    differences_facts,
    intervals_of,
    told_lines,
)
from lib.retrieval.commands import Execute, executor, locked, signals_as_interrupt
from lib.retrieval.comparison import FinishedRun, Row, last_line
from tools.compare.looks import chooses_patches, is_seen, look, looks_table, seen
from tools.compare.pool import Pool
from tools.compare.recipe import Recipe, read_recipe
from tools.compare.rows import pick_rows, rows_of
from tools.compare.runs import (
    Planned,
    changes,
    eval_command,
    flag_words,
    plan_run,
    refuse_changed,
    train_once,
)
from tools.compare.tuning import dev_rsum, plan_trials, trials_table, tuned

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
    parser.add_argument(
        "--recipe",
        default=None,
        metavar="FILE",
        help="YAML of rows, flags, seeds and what is tuned, as recipes/compare/photos.yaml",
    )
    parser.add_argument(
        "--dataset", default=None, metavar="NAME", help="as in train.py; default: scenes"
    )
    parser.add_argument("--ablations", action="store_true", help="variants of seps, ranked on dev")
    parser.add_argument("--rows", default=None, help="rows to run, e.g. seps,laps; default: all")
    parser.add_argument(
        "--seeds", action=IntegerList, default=None, help="of each row; default: 0 1 2"
    )
    parser.add_argument("--epochs", type=int, default=None, help="--num_epochs of every run")
    parser.add_argument(
        "--train",
        default="",
        metavar="FLAGS",
        help='train.py flags of every run, in one word: --train="--batch_size 32"',
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each with its share of the cores"
    )
    parser.add_argument(
        "--out", default=None, help="default: runs/compare, runs/ablations with --ablations"
    )
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return what the flags ask to be run: the rows of --recipe, or every method, or ablations.

    Raises InputError for flags that contradict each other or that this tool sets itself.
    """
    words = flag_words(args.train, OURS)
    epochs = [] if args.epochs is None else ["--num_epochs", str(args.epochs)]
    if args.recipe is None:
        seeds = [0, 1, 2] if args.seeds is None else args.seeds
        flags = (*words, *epochs)
        return Recipe(args.dataset or "scenes", tuple(seeds), flags, tuple(rows_of(args)))
    if args.ablations:
        raise InputError("--recipe and --ablations exclude each other: leave one out")
    recipe = read_recipe(args.recipe)
    return replace(
        recipe,
        dataset=args.dataset or recipe.dataset,
        seeds=recipe.seeds if args.seeds is None else tuple(args.seeds),
        flags=(*recipe.flags, *words, *epochs),
    )


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
        self.recipe = recipe_of(args)
        self.out = Path(args.out or self.kind.out)
        self.command = shlex.join(["python", "-m", "tools.compare", *argv])
        if not self.recipe.seeds:
            raise InputError("--seeds: give at least one number, e.g. --seeds 0,1,2")
        self.flags = ["--dataset", self.recipe.dataset, *self.recipe.flags]
        self.rows = pick_rows(self.recipe.rows, args.rows)
        self.trials = self._planned_trials()
        self.runs = self._planned(self.rows)  # before tuning: flags that can't be are told now
        self.rsums_before: dict[tuple[str, str], float | None] = {}  # trials of rows not picked
        self.others = self._planned_others()
        if not self.trials:
            self._adopt(self.rows)
        self.execute = execute
        self.count_parameters = count_parameters
        self.machine = comparison.machine_name(_gpu_name(self.runs[0].settings["gpu_id"]))
        self.differences: list[str] = []
        self.pool = Pool(args.jobs, self.write_page)

    def _planned(self, rows: Sequence[Row]) -> list[Planned]:
        """Return all rows of a seed before the next seed, so that an early stop leaves a table."""
        seeds = dict.fromkeys(self.recipe.seeds)
        return [plan_run(row, seed, self.flags, self.out) for seed in seeds for row in rows]

    def _planned_trials(self) -> dict[tuple[str, str], Planned]:
        if self.recipe.tuning is None:
            return {}
        trials = plan_trials(self.recipe.tuning, self.rows, self.flags, self.out)
        for run in trials.values():
            refuse_changed(run)
        return trials

    def _planned_others(self) -> list[Planned]:
        """Return the runs of rows not picked now, as tuned: they are shown where they agree."""
        found: list[Planned] = []
        for row in (one for one in self.recipe.rows if one not in self.rows):
            with contextlib.suppress(InputError):
                found += self._planned(self._tuned_before(row))
        return found

    def _tuned_before(self, row: Row) -> list[Row]:
        """Return the row with the flags of its best trial; nothing where a trial is to come."""
        if self.recipe.tuning is None:
            return [row]
        trials = plan_trials(self.recipe.tuning, [row], self.flags, self.out)
        rsums = {name: None if changes(run) else dev_rsum(run) for name, run in trials.items()}
        self.rsums_before |= rsums
        return tuned(self.recipe.tuning, [row], rsums)

    def _adopt(self, rows: Sequence[Row]) -> None:
        """Take these rows, with what was tuned, for those that are run and shown."""
        self.runs = self._planned(rows)
        for run in self.runs:
            refuse_changed(run)

    def run(self) -> int:
        """Run what is not finished, rewriting the page after each; return the exit code, 0 or 1."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            comparison.require_matplotlib()
        except InputError as error:
            print(error, file=sys.stderr)
        with locked(self.out) as lock:
            execute = self.execute or executor(lock, self.pool.stopped, self.pool.environment())
            if self.trials:
                self.tune(execute)
            self.write_page()
            done = [run for run in self.runs if self.finished(run) is not None and self._seen(run)]
            self.pool.work(self.runs, done, lambda run, show: self.carry_out(run, execute, show))
        for name, reason in self.pool.failures.items():
            print(f"{name} failed: {reason}", file=sys.stderr)
        for line in self.differences:
            print(line)
        print(f"written to {self.out / 'README.md'}")
        return 1 if self.pool.failures else 0

    def tune(self, execute: Execute) -> None:
        """Run the trials, and take each row with the flags that were best on dev."""
        done = [run for run in self.trials.values() if dev_rsum(run) is not None]
        self.pool.work(
            list(self.trials.values()), done, lambda run, show: train_once(run, execute, show)
        )
        self._adopt(tuned(self.recipe.tuning, self.rows, self._dev_rsums()))

    def _dev_rsums(self) -> dict[tuple[str, str], float | None]:
        return {name: dev_rsum(run) for name, run in self.trials.items()}

    def carry_out(self, run: Planned, execute: Execute, show: Callable) -> str | None:
        """Train, or go on with training, then evaluate; return why it failed, None where not."""
        failure = train_once(run, execute, show)
        if failure is not None:
            return failure
        state = run.state
        if "parameters" not in state:
            try:
                with self.pool.alone:  # transformers can't be imported by two threads at once
                    state["parameters"] = self.count_parameters(run.folder / BEST)
            except InputError as error:
                return str(error)
        run.keep({"machine": self.machine, **state})
        for split in self.kind.splits:
            if not self._has_table(run, split) and execute(eval_command(run, split), run.log, show):
                return f"{last_line(run.log)} ({run.log})"
            if not self._has_table(run, split):
                return f"eval.py wrote no results of {split} ({run.log})"
        if not self._is_looked_at(run):
            return None
        return look(run, self.recipe.looks, self._is_first(run), execute, show)

    def _is_first(self, run: Planned) -> bool:
        return run.seed == self.recipe.seeds[0]

    def _is_looked_at(self, run: Planned) -> bool:
        looks = self.recipe.looks
        on_seed = looks is not None and (looks.every_seed or self._is_first(run))
        return on_seed and chooses_patches(run)

    def _seen(self, run: Planned) -> bool:
        return not self._is_looked_at(run) or is_seen(run, self.recipe.looks, self._is_first(run))

    def _has_table(self, run: Planned, split: str) -> bool:
        return bool(run.tables([split]))

    def finished(self, run: Planned) -> FinishedRun | None:
        """Return what the run measured, None where it is not trained and evaluated."""
        state = run.state
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
        same = [*self.runs, *(run for run in self.others if not changes(run))]
        found = {run.name: self.finished(run) for run in same}
        runs = [one for one in found.values() if one is not None]
        groups = comparison.by_protocol(comparison.summarize(runs), self.kind.ranked_on)
        against = against_baselines(groups, runs, self.kind.ranked_on, self.recipe.against)
        self.differences = told_lines(against)
        title = f"{self.kind.title} on {self.recipe.dataset}"
        page = comparison.report_page(
            title,
            [*self._facts(runs), *differences_facts(against, self.recipe.against)],
            groups,
            self.pool.unfinished(self._without_results(found)),
            self._chart(groups, title),
            self.kind.splits,
            self.kind.recalls,
            against_cells(against),
            intervals_of(runs, self.kind.ranked_on),
        )
        write_text_whole(self.out / "README.md", "\n".join([page, *self._more(same)]))

    def _without_results(self, found: dict[str, FinishedRun | None]) -> list[str]:
        """Return the names of runs that the page lacks, and of trials that failed."""
        failed = [one.name for one in self.trials.values() if one.name in self.pool.failures]
        return [*failed, *(run.name for run in self.runs if found[run.name] is None)]

    def _more(self, runs: Sequence[Planned]) -> list[str]:
        """Return the sections on what was tuned, and on the patches that these runs keep."""
        parts = []
        if self.trials:
            rsums = {**self.rsums_before, **self._dev_rsums()}
            tried = {row for (row, _), rsum in rsums.items() if rsum is not None}
            rows = [one for one in self.recipe.rows if one in self.rows or one.name in tried]
            table = trials_table(self.recipe.tuning, rows, rsums)
            parts.append(
                f"## Tuned on dev: rSum of each trial, seed {self.recipe.tuning.seed}\n\n{table}"
            )
        looks = self.recipe.looks
        places = [row.name for row in self.recipe.rows]
        ordered = sorted(runs, key=lambda run: places.index(run.row.name))
        looked = [seen(run, looks) for run in ordered if self._is_looked_at(run)]
        if any(looked):
            table = looks_table([one for one in looked if one is not None], looks)
            where = "over seeds" if looks.every_seed else f"seed {self.recipe.seeds[0]}"
            parts.append(f"## Patches kept, {where}\n\n{table}")
        return parts

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


def _count_parameters(checkpoint: Path) -> int:
    model, _ = load_model(checkpoint)
    return sum(one.numel() for one in model.parameters())


def _gpu_name(number: int) -> str | None:
    known = torch.cuda.is_available() and number < torch.cuda.device_count()
    return torch.cuda.get_device_name(number) if known else None


if __name__ == "__main__":
    sys.exit(main())
