"""tools.compare by a recipe: what it holds, tuning on dev, several runs at a time, what is kept."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from arguments import parse_train
from lib.errors import InputError
from lib.methods.registry import method_names
from lib.retrieval.bootstrap import paired_differences
from lib.retrieval.comparison import Row, changed_settings
from lib.retrieval.metrics import QueryRanks
from lib.retrieval.result_files import ranks_file, write_ranks, write_results
from tests.retrieval.test_compare import FakeRunner, table
from tools.compare import __main__ as compare
from tools.compare import tuning
from tools.compare.recipe import read_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "recipes/compare").glob("*.yaml"))
TEXT = """
dataset: scenes
seeds: [0, 1]
against: laps
flags: {batch_size: 16, margin: 0.2}
rows:
  laps: {method: laps}
  seps_plain: {method: seps, dense_side: none}
  vse: {method: vse}
tuning:
  seed: 7
  flags: {num_epochs: 1}
  trials:
    default: {}
    wide: {margin: 0.4}
looks: {images: 20, controls: [random], drawn: ["3", "5"]}
"""


class Runner(FakeRunner):
    """A fake that knows of trials, of parts of a split and of pictures."""

    def evaluate(self, argv: list[str], folder: Path, row: str) -> None:
        if "--first_images" not in argv:
            super().evaluate(argv, folder, row)
            return
        control = (
            argv[argv.index("--selection_control") + 1] if argv[-2] != "--attention_kept" else ""
        )
        seed = int(folder.name.removeprefix("seed"))
        entry = {**table(90.0 - 2 * seed if control else 100.0), "split": "test"}
        if not control:
            entry["named_area"] = {"kept": 0.75 + seed / 10, "random": 0.5, "best": 1.0}
            entry["attention_kept"] = {"kept": 0.625, "random": 0.5, "best": 0.875}
        name = f"scenes_20_first20{'_' + control if control else ''}"
        write_results(folder / "results.json", {name: entry})

    def __call__(self, command: list[str], log: Path, tick) -> int:
        if command[1] == "-m":  # the pictures
            self.commands.append(command[2:])
            out = Path(command[command.index("--out") + 1])
            out.mkdir()
            for one in command[command.index("--image") + 1 :]:
                (out / f"{one}_captions.png").touch()
            return 0
        return super().__call__(command, log, tick)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def rsums(monkeypatch) -> dict[str, float]:
    """What dev said of a trial, by trial and row; 10 unless set."""
    found: dict[str, float] = {}

    def payload(path: Path) -> dict[str, float]:
        return {"best_rsum": found.get(f"{path.parts[-4]}/{path.parts[-3]}", 10.0)}

    monkeypatch.setattr(tuning, "read_payload", payload)
    return found


def test_each_row_is_tuned_alike_and_run_with_what_was_best(recipe, rsums, tmp_path):
    rsums["wide/laps"] = 20.0
    runner, out = Runner(), tmp_path / "out"
    words = ["--recipe", str(recipe), "--out", str(out)]
    assert compare.main(words, runner, lambda _: 5) == 0
    trials = [parse_train(one[1:]) for one in runner.commands if "tuning" in str(one)]
    assert len(trials) == 6  # three rows, two trials
    assert {(one.seed, one.num_epochs) for one in trials} == {(7, 1)}
    final = {
        (one.method, one.seed): one.margin
        for one in (parse_train(words[1:]) for words in runner.commands if words[0] == "train.py")
        if one.seed != 7
    }
    expected = {"laps": 0.4, "seps": 0.2, "vse": 0.2}
    assert final == {(name, seed): margin for name, margin in expected.items() for seed in (0, 1)}
    page = (out / "README.md").read_text()
    assert "| laps | 10.0 | **20.0** |" in page
    assert "| laps | `--margin 0.4 --method laps` |" in page
    runner.commands.clear()
    assert compare.main(words, runner, lambda _: 5) == 0
    assert runner.commands == []


def test_rows_that_are_not_picked_stay_on_the_page_as_they_were_tuned(recipe, rsums, tmp_path):
    rsums["wide/laps"] = 20.0
    runner, out = Runner(), tmp_path / "out"
    words = ["--recipe", str(recipe), "--out", str(out)]
    assert compare.main(words, runner, lambda _: 5) == 0
    sections = (out / "README.md").read_text()
    sections = sections[sections.index("## Tuned") :]
    runner.commands.clear()
    assert compare.main([*words, "--rows", "vse"], runner, lambda _: 5) == 0
    page = (out / "README.md").read_text()
    assert runner.commands == []
    assert "| laps | `--margin 0.4 --method laps` |" in page
    assert page.endswith(sections)  # trials and kept patches of all rows, in the recipe's order
    recipe.write_text(TEXT.replace("num_epochs: 1", "num_epochs: 2"))  # laps was tuned otherwise
    fresh = tmp_path / "out/tuning"
    for trial in ("default", "wide"):
        shutil.rmtree(fresh / trial / "vse")
    assert compare.main([*words, "--rows", "vse"], runner, lambda _: 5) == 0
    assert "| laps |" not in (out / "README.md").read_text()


def test_test_is_not_looked_at_before_every_trial_is_done(recipe, rsums, tmp_path):
    runner = Runner()
    compare.main(["--recipe", str(recipe), "--out", str(tmp_path / "out")], runner, lambda _: 5)
    programs = [words[0] for words in runner.commands]
    assert programs.index("eval.py") >= 6
    assert all("--eval" not in words for words in runner.commands)


def test_a_row_whose_trial_failed_is_left_out(recipe, rsums, tmp_path, capsys):
    runner, out = Runner(), tmp_path / "out"
    runner.broken = {"laps"}
    assert compare.main(["--recipe", str(recipe), "--out", str(out)], runner, lambda _: 5) == 1
    told, page = capsys.readouterr().err, (out / "README.md").read_text()
    for trial in ("default", "wide"):
        assert f"laps seed 7, {trial} failed" in told
        assert f"- laps seed 7, {trial}: " in page
    assert not (out / "laps").exists()
    assert (out / "vse/seed1/results.json").exists()


def test_what_is_kept_is_told_for_rows_that_choose(recipe, rsums, tmp_path):
    runner, out = Runner(), tmp_path / "out"
    assert compare.main(["--recipe", str(recipe), "--out", str(out)], runner, lambda _: 5) == 0
    page = (out / "README.md").read_text()
    section = page[page.index("## Patches kept") :]
    kept = "0.750 | 0.500 | 1.000 | 0.625 | 0.500 | 0.875"  # named area, then attention
    assert f"| seps_plain | 100.0 | -10.0 | {kept} |" in section
    assert "| vse |" not in section
    assert (out / "laps/seed0/pictures/5_captions.png").exists()
    assert not (out / "laps/seed1/pictures").exists()


def test_what_a_control_costs_has_an_interval_over_images(recipe, rsums, tmp_path):
    """It is the paired bootstrap of the two evaluations' ranks."""
    out, owners = tmp_path / "out", np.repeat(np.arange(20), 5)
    words = ["--recipe", str(recipe), "--out", str(out)]
    assert compare.main(words, Runner(), lambda _: 5) == 0
    folder, ranks = out / "laps/seed0", {}
    entries = json.loads((folder / "results.json").read_text())
    rng = np.random.default_rng(0)
    for name, worst in (("scenes_20_first20", 8), ("scenes_20_first20_random", 16)):
        drawn = rng.integers(1, worst, 20), rng.integers(1, worst, 100)
        ranks[name] = QueryRanks(*drawn, owners)
        write_ranks(folder / ranks_file(name), ranks[name])
        rsum = ranks[name].metrics()["rsum"]
        entries[name] |= {"ranks": ranks_file(name), "rsum": rsum}
    write_results(folder / "results.json", entries)
    assert compare.main(words, Runner(), lambda _: 5) == 0
    learned, random = ranks.values()
    one = paired_differences([random], [learned], repeats=2000)["rsum"]
    told = f"{one.a - one.b:+.1f} ({one.low:+.1f} to {one.high:+.1f})"
    assert one.high < 0
    assert f"| {learned.metrics()['rsum']:.1f} | {told} |" in (out / "README.md").read_text()


def test_what_is_kept_is_told_over_every_seed(recipe, rsums, tmp_path):
    recipe.write_text(TEXT.replace("{images: 20,", "{images: 20, every_seed: true,"))
    runner, out = Runner(), tmp_path / "out"
    words = ["--recipe", str(recipe), "--out", str(out)]
    assert compare.main(words, runner, lambda _: 5) == 0
    page = (out / "README.md").read_text()
    section = page[page.index("## Patches kept, over seeds") :]
    assert "| laps | 100.0 ± 0.0 | -11.0 ± 1.4 | 0.800 | 0.500 | 1.000 |" in section
    assert (out / "laps/seed0/pictures/5_captions.png").exists()
    assert not (out / "laps/seed1/pictures").exists()
    runner.commands.clear()
    assert compare.main(words, runner, lambda _: 5) == 0
    assert runner.commands == []


def test_jobs_run_at_the_same_time_but_stages_wait(recipe, tmp_path):
    recipe.write_text(
        "dataset: scenes\nseeds: [0]\nrows:\n  d2s_pretrain: {method: d2s, pretrain: true}\n"
        "  d2s: {method: d2s, distill: true, weight_path: '@d2s_pretrain'}\n  vse: {method: vse}\n"
    )
    going, most, spans, lock = set(), [0], {}, threading.Lock()

    class Slow(Runner):
        def train(self, argv: list[str], folder: Path, row: str) -> None:
            with lock:
                going.add(row)
                most[0] = max(most[0], len(going))
            begun = time.monotonic()
            time.sleep(0.3)
            super().train(argv, folder, row)
            with lock:
                going.discard(row)
                spans[row] = (begun, time.monotonic())

    words = ["--recipe", str(recipe), "--jobs", "3", "--out", str(tmp_path / "out")]
    assert compare.main(words, Slow(), lambda _: 5) == 0
    assert most[0] == 2
    assert spans["d2s"][0] >= spans["d2s_pretrain"][1]
    assert spans["vse"][0] < spans["d2s_pretrain"][1]


def test_jobs_count_parameters_one_after_another(recipe, rsums, tmp_path):
    """Two threads that build a model at once import parts of transformers that are half there."""
    going, most = [0], [0]

    def count(path: Path) -> int:
        going[0] += 1
        most[0] = max(most[0], going[0])
        time.sleep(0.2)
        going[0] -= 1
        return 5

    words = ["--recipe", str(recipe), "--jobs", "3", "--out", str(tmp_path / "out")]
    assert compare.main(words, Runner(), count) == 0
    assert most == [1]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("dataset: scenes", "data: scenes", "data is no part of a recipe"),
        ("against: laps", "against: scan", "scan is none of the rows"),
        ("against: laps", "against: [laps]", "is none of the rows"),
        ("seps, dense_side: none", "seps, weight_path: '@none'", "@none is none of the rows"),
        ("{images: 20,", "{images: 0,", "looks: images: give at least 1"),
        ("margin: 0.2", "margn: 0.2", "did you mean margin"),
        ("margin: 0.4", "margin: [[1]]", "trial wide: margin"),
        ("{images: 20,", "{image: 20,", "looks holds images"),
        ("{images: 20,", "{images: 20, every_seed: 2,", "every_seed: give true or false"),
        ("seeds: [0, 1]", "seeds: 3", "seeds: give whole numbers"),
        ("rows:", "rows: [", "not YAML"),
        ("  vse: {method: vse}", "  vse: 3", "row vse must be names with values"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_sentence(recipe, old, new, told):
    recipe.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(InputError, match=r"recipe\.yaml") as error:
        read_recipe(recipe)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_that_reads_no_pixels_is_given_no_features(tmp_path):
    flags = ["--dataset", "scenes", "--freeze", "image", "--feature_cache", str(tmp_path)]
    run = compare.plan_run(Row("text", ("--method", "dense_text")), 0, flags, tmp_path)
    assert not run.settings["feature_cache"]
    assert "--feature_cache" not in compare.eval_command(run, "test")
    run = compare.plan_run(Row("laps", ("--method", "laps")), 0, flags, tmp_path)
    assert run.settings["feature_cache"] == str(tmp_path)


@pytest.mark.parametrize("row", ["avse --freeze image", "vse --precomp 1"])
def test_so_is_a_row_whose_encoder_states_no_cache_holds(row, tmp_path):
    flags, one = ["--dataset", "scenes"], Row("one", ("--method", *row.split()))
    plain = compare.plan_run(one, 0, flags, tmp_path)
    assert plain.settings["feature_cache"] is None
    run = compare.plan_run(one, 0, [*flags, "--feature_cache", str(tmp_path)], tmp_path)
    assert not run.settings["feature_cache"]
    assert changed_settings(run.settings, plain.settings, {}) == []  # so an earlier run counts


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_parses_whole(path, tmp_path):
    args = compare.parser().parse_args(["--recipe", str(path), "--out", str(tmp_path)])
    comparing = compare.Comparison(args, [], Runner(), lambda _: 5)
    assert len(comparing.runs) == len(comparing.recipe.rows) * len(comparing.recipe.seeds)
    assert json.dumps([run.settings for run in comparing.runs])


def test_a_quotation_that_is_not_closed_is_a_sentence(tmp_path, capsys):
    assert compare.main(["--train", '"--workers 1', "--out", str(tmp_path)], Runner(), len) == 2
    assert "No closing quotation" in capsys.readouterr().err


def test_the_comparison_on_scenes_has_every_method():
    recipe = read_recipe(next(path for path in SHIPPED if path.stem == "scenes"))
    rows = " ".join(" ".join(row.flags) for row in recipe.rows)
    missing = [name for name in method_names() if f"--method {name}" not in rows]
    assert missing == ["ilaps"]  # with its flags at their defaults it is laps
