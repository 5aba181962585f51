"""tools.compare: tables and charts of made-up results, and going on with a fake train.py."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2
import pytest

from arguments import parse_train
from lib.checkpoints.checkpoint import plain_arguments
from lib.errors import InputError
from lib.methods.registry import get_method, method_names
from lib.retrieval import commands
from lib.retrieval.comparison import (
    FinishedRun,
    Row,
    by_protocol,
    changed_settings,
    draw_chart,
    format_seconds,
    last_line,
    markdown_table,
    report_page,
    summarize,
)
from lib.retrieval.result_files import write_results
from tools.compare import __main__ as compare
from tools.compare.rows import ABLATIONS, rows_of


def table(rsum: float, protocol: str = "none") -> dict:
    """A results.json entry of which only the recalls and rSum matter."""
    recalls = {"r1": rsum / 10, "r5": rsum / 6, "r10": rsum / 5}
    return {
        "i2t": recalls,
        "t2i": recalls,
        "rsum": rsum,
        "protocol": protocol,
        "val_split": "dev",
    }


def finished(name: str, seed: int, rsum: float, protocol: str = "none", dev: float = 0.0):
    tables = {"dev": table(dev, protocol), "test": table(rsum, protocol)}
    return FinishedRun(Row(name, ("--method", name)), seed, tables, 1234567, 60.0 + seed, "a CPU")


# --- tables ------------------------------------------------------------------------------------


def test_means_and_deviations_over_seeds():
    runs = [finished("laps", seed, rsum) for seed, rsum in enumerate([300.0, 306.0, 312.0])]
    (one,) = summarize(runs)
    assert one.rsum["test"] == (306.0, 6.0)
    assert one.seeds == (0, 1, 2)
    assert one.seconds == 61.0
    assert one.recalls["i2t", "r1"] == pytest.approx(30.6)
    line = markdown_table([one]).splitlines()[-1]
    assert line == (
        "| laps | `--method laps` | 30.6 | 51.0 | 61.2 | 30.6 | 51.0 | 61.2 "
        "| 306.0 ± 6.0 | 1,234,567 | 61 | 0, 1, 2 |"
    )


def test_a_single_seed_has_no_deviation():
    (one,) = summarize([finished("laps", 0, 300.0)])
    assert one.rsum["test"] == (300.0, None)
    assert "| 300.0 |" in markdown_table([one])


def test_protocols_are_never_mixed_in_a_ranking():
    runs = [
        finished("oracle", 0, 590.0, "oracle"),
        finished("weak", 0, 200.0, "none"),
        finished("dense", 0, 500.0, "image"),
        finished("strong", 0, 400.0, "none"),
    ]
    groups = by_protocol(summarize(runs))
    assert list(groups) == ["none", "image", "oracle"]
    assert [one.row.name for one in groups["none"]] == ["strong", "weak"]
    page = report_page("title", ["a fact"], groups, ["laps seed 1: waiting"], "rsum.png")
    sections = {part.split("`")[1]: part for part in page.split("## Protocol ")[1:]}
    assert "| strong |" in sections["none"]
    assert "| dense |" not in sections["none"]
    assert "| oracle |" in sections["oracle"]
    assert "- laps seed 1: waiting" in page


def test_a_row_of_two_protocols_gets_a_line_in_each():
    runs = [finished("a", 0, 300.0, "none"), finished("a", 1, 500.0, "oracle")]
    assert [one.rsum["test"][0] for one in summarize(runs)] == [300.0, 500.0]


def test_an_unknown_protocol_is_an_error():
    with pytest.raises(ValueError, match="unknown protocol 'other'"):
        by_protocol(summarize([finished("a", 0, 1.0, "other")]))


def test_ablations_are_ranked_on_dev():
    runs = [finished("a", 0, 300.0, dev=400.0), finished("b", 0, 500.0, dev=200.0)]
    groups = by_protocol(summarize(runs), "dev")
    assert [one.row.name for one in groups["none"]] == ["a", "b"]
    lines = markdown_table(groups["none"], ("dev", "test"), recalls=False).splitlines()
    assert "| dev rSum | test rSum |" in lines[0]
    assert "| 400.0 | 300.0 |" in lines[2]
    assert "R@1" not in lines[0]


def test_the_chart_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        finished(name, seed, rsum + 4 * seed, protocol)
        for name, rsum, protocol in [
            ("laps", 300.0, "none"),
            ("seps", 400.0, "image"),
            ("seps_oracle", 500.0, "oracle"),
        ]
        for seed in range(3)
    ]
    draw_chart(by_protocol(summarize(runs)), tmp_path / "rsum.png", "title")
    picture = cv2.imread(str(tmp_path / "rsum.png"))
    assert picture.shape[1] > 1000
    for colour in ((0x44, 0x77, 0xAA), (0x22, 0x88, 0x33), (0xCC, 0x66, 0x77)):
        assert (picture[:, :, ::-1] == colour).all(-1).sum() > 1000


def test_a_chart_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    groups = by_protocol(summarize([finished("a", 0, 1.0)]))
    with pytest.raises(InputError, match="requirements-dev"):
        draw_chart(groups, tmp_path / "rsum.png", "title")


def test_changed_settings():
    defaults = {"margin": 0.2, "young": 1}
    saved = {"margin": 0.2, "workers": 8, "val_split": "held_out"}
    planned = {"margin": 0.2, "workers": 2, "val_split": "dev", "young": 1}
    assert changed_settings(planned, saved, defaults) == []
    assert changed_settings({**planned, "young": 2}, saved, defaults) == ["--young 1, now 2"]
    assert changed_settings({**planned, "margin": 0.3}, saved, defaults) == [
        "--margin 0.2, now 0.3"
    ]
    assert changed_settings({**planned, "val_split": "test"}, saved, defaults) != []


def test_last_line_of_a_log_with_progress_bars(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\n 10%|#  |\r 20%|## |\r\nerror: no\r   \r\n\n")
    assert last_line(log) == "error: no"
    assert last_line(tmp_path / "missing") == "it said nothing"


def test_seconds():
    assert format_seconds(61) == "1:01"
    assert format_seconds(3661) == "1:01:01"


# --- runs --------------------------------------------------------------------------------------


class FakeRunner:
    """Does what train.py and eval.py leave behind; a run's folder named in `broken` fails."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.broken: set[str] = set()
        self.interrupt: str | None = None  # stops in the middle of this row's training
        self.early = False  # before the first checkpoint

    def __call__(self, command: list[str], log: Path, tick) -> int:
        program, argv = Path(command[1]).name, command[2:]
        self.commands.append([program, *argv])
        row = log.parent.parent.name
        tick()
        if row in self.broken:
            log.write_text("epoch 1\nerror: it broke\n")
            return 3
        if program == "train.py":
            self.train(argv, log.parent, row)
        else:
            self.evaluate(argv, log.parent, row)
        return 0

    def train(self, argv: list[str], folder: Path, row: str) -> None:
        if "--resume" not in argv:
            settings = plain_arguments(parse_train(argv))
            (folder / "args.json").write_text(json.dumps(settings))
        if not self.early:
            (folder / "checkpoint_last.pth").touch()
        if row == self.interrupt:
            raise KeyboardInterrupt
        (folder / "model_best.pth").touch()

    def evaluate(self, argv: list[str], folder: Path, row: str) -> None:
        assert argv[argv.index("--checkpoint") + 1] == str(folder / "model_best.pth")
        split = argv[argv.index("--split") + 1]
        settings = argparse.Namespace(**json.loads((folder / "args.json").read_text()))
        owner = get_method(settings.method).wants_dense(settings)
        protocol = {"image": "image", "caption": "oracle", None: "none"}[owner]
        name = "scenes" if split == "test" else "scenes_dev"
        write_results(folder / "results.json", {name: table(100.0 + len(row), protocol)})

    @property
    def told(self) -> list[str]:
        """Each command as program, row or folder, and how it began."""
        return [
            f"{words[0]} {'resume' if '--resume' in words else 'new'} {_folder(words)}"
            if words[0] == "train.py"
            else f"eval.py {words[words.index('--split') + 1]} {_folder(words)}"
            for words in self.commands
        ]


def _folder(words: list[str]) -> str:
    flags = {"--logger_name": 0, "--resume": 0, "--checkpoint": 1}
    flag = next(flag for flag in flags if flag in words)
    path = Path(words[words.index(flag) + 1])
    path = path.parent if flags[flag] else path
    return f"{path.parent.name}/{path.name}"


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def call(tmp_path, runner):
    """Run the tool into tmp_path/out with the fake runner; return its exit code."""

    def run(*argv: str) -> int:
        runner.commands.clear()
        return compare.main([*argv, "--out", str(tmp_path / "out")], runner, lambda _: 4321)

    return run


def test_runs_train_then_evaluate_then_are_skipped(call, runner, tmp_path):
    assert call("--rows", "seps,laps", "--seeds", "0,1", "--epochs", "2") == 0
    assert runner.told[:4] == [
        "train.py new seps/seed0",
        "eval.py test seps/seed0",
        "train.py new laps/seed0",
        "eval.py test laps/seed0",
    ]
    assert len(runner.told) == 8
    page = (tmp_path / "out/README.md").read_text()
    assert "| seps | `--method seps` |" in page
    assert "104.0 ± 0.0 | 4,321 |" in page
    assert "python -m tools.compare --rows seps,laps --seeds 0,1 --epochs 2" in page
    assert "Not finished" not in page
    assert [one.name for one in (tmp_path / "out/seps/seed0").glob("*.pth")] == ["model_best.pth"]
    assert call("--rows", "seps,laps", "--seeds", "0,1", "--epochs", "2") == 0
    assert runner.commands == []


def test_every_run_gets_the_same_flags_and_its_own(call, runner):
    extra = ["--epochs", "3", "--train=--batch_size 32"]
    assert call("--rows", "seps_no_dense", "--seeds", "5", *extra) == 0
    words = runner.commands[0]
    settings = parse_train(words[1:])
    assert (settings.seed, settings.num_epochs, settings.batch_size) == (5, 3, 32)
    assert (settings.method, settings.dense_side) == ("seps", "none")


def test_every_registered_method_and_variant_is_a_row():
    args = compare.parser().parse_args([])
    names = [row.name for row in rows_of(args)]
    assert set(method_names()) <= set(names)
    assert {"seps_no_dense", "seps_match", "seps_oracle"} <= set(names)
    assert len(names) == len(set(names))
    for row in [*rows_of(args), *ABLATIONS]:
        compare.plan_run(row, 0, ["--dataset", "scenes"], Path("out"))


def test_a_stopped_run_goes_on_and_its_time_adds_up(call, runner, tmp_path, capsys):
    runner.interrupt = "laps"
    assert call("--rows", "seps,laps", "--seeds", "0") == 130
    assert "same command again" in capsys.readouterr().err
    page = (tmp_path / "out/README.md").read_text()
    assert "| seps |" in page
    assert "- laps seed 0: waiting" in page
    state = tmp_path / "out/laps/seed0/compare.json"
    assert json.loads(state.read_text())["train_seconds"] >= 0
    state.write_text(json.dumps({"train_seconds": 1000.0}))
    runner.interrupt = None
    assert call("--rows", "seps,laps", "--seeds", "0") == 0
    assert runner.told == ["train.py resume laps/seed0", "eval.py test laps/seed0"]
    assert 1000 <= json.loads(state.read_text())["train_seconds"] < 1010
    assert "Not finished" not in (tmp_path / "out/README.md").read_text()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(call, runner, tmp_path):
    runner.interrupt, runner.early = "laps", True
    assert call("--rows", "laps", "--seeds", "0") == 130
    runner.interrupt = None
    assert call("--rows", "laps", "--seeds", "0") == 0
    assert runner.commands[0][-2:] == ["--overwrite", "1"]
    assert runner.told == ["train.py new laps/seed0", "eval.py test laps/seed0"]


def test_a_trained_run_without_results_is_only_evaluated(call, runner, tmp_path):
    assert call("--rows", "laps", "--seeds", "0") == 0
    (tmp_path / "out/laps/seed0/results.json").write_text("{")
    assert call("--rows", "laps", "--seeds", "0") == 0
    assert runner.told == ["eval.py test laps/seed0"]


def test_results_of_an_unfinished_training_do_not_count(call, runner, tmp_path):
    assert call("--rows", "laps", "--seeds", "0") == 0
    (tmp_path / "out/laps/seed0/compare.json").unlink()
    (tmp_path / "out/laps/seed0/checkpoint_last.pth").touch()
    assert call("--rows", "laps", "--seeds", "0") == 0
    assert runner.told == ["train.py resume laps/seed0", "eval.py test laps/seed0"]


def test_changed_settings_are_refused_before_anything_runs(call, runner, capsys):
    assert call("--rows", "laps", "--seeds", "0", "--epochs", "2") == 0
    assert call("--rows", "seps,laps", "--seeds", "0", "--epochs", "3") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out/laps/seed0 holds a run with other settings (--num_epochs 2, now 3)" in message
    assert runner.commands == []
    assert call("--rows", "laps", "--seeds", "0", "--epochs", "2", "--train=--workers 0") == 0


def test_rows_not_picked_stay_on_the_page_where_they_agree(call, tmp_path):
    assert call("--rows", "laps", "--seeds", "0", "--epochs", "2") == 0
    assert call("--rows", "seps", "--seeds", "0", "--epochs", "2") == 0
    assert "| laps |" in (tmp_path / "out/README.md").read_text()
    assert call("--rows", "vse", "--seeds", "0", "--epochs", "3") == 0
    page = (tmp_path / "out/README.md").read_text()
    assert "| vse |" in page
    assert "| laps |" not in page


def test_a_failing_run_is_reported_and_the_others_go_on(call, runner, tmp_path, capsys):
    runner.broken = {"laps"}
    assert call("--rows", "laps,seps", "--seeds", "0") == 1
    assert "laps seed 0 failed: error: it broke" in capsys.readouterr().err
    page = (tmp_path / "out/README.md").read_text()
    assert "- laps seed 0: error: it broke" in page
    assert "| seps |" in page
    runner.broken = set()
    assert call("--rows", "laps,seps", "--seeds", "0") == 0
    assert runner.told == ["train.py new laps/seed0", "eval.py test laps/seed0"]


def test_ablations_show_dev_and_test(call, runner, tmp_path):
    assert call("--ablations", "--rows", "default,oracle_dense", "--seeds", "0") == 0
    assert runner.told[:3] == [
        "train.py new default/seed0",
        "eval.py dev default/seed0",
        "eval.py test default/seed0",
    ]
    page = (tmp_path / "out/README.md").read_text()
    assert "| dev rSum | test rSum |" in page
    assert page.index("| default |") < page.index("Protocol `oracle`") < page.index("| oracle_")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--rows", "nothing"], "--rows nothing: no such row; there are avse"),
        (["--seeds", ""], "--seeds"),
        (["--train=--seed 4"], "--train --seed: this tool sets that flag"),
        (["--train=--batch_size 0"], "--batch_size 0"),
    ],
)
def test_bad_flags_are_refused(call, runner, capsys, argv, told):
    assert call(*argv) == 2
    assert told in capsys.readouterr().err
    assert runner.commands == []


def test_two_comparisons_in_one_folder_are_refused(call, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with commands.locked(tmp_path / "out"):
        assert call("--rows", "laps", "--seeds", "0") == 2
    assert "is in use by another comparison" in capsys.readouterr().err


@pytest.mark.slow
def test_two_rows_end_to_end(scenes_path, tmp_path):
    flags = "--scenes_size 32,16,16 --img_res 64 --tiny_patch_size 16 --batch_size 16"
    flags += " --workers 0 --tiny_width 16"
    argv = ["--rows", "vse,seps", "--seeds", "0", "--epochs", "1", "--out", str(tmp_path / "out")]
    argv.append(f"--train={flags} --tiny_layers 1 --data_path {scenes_path}")
    assert compare.main(argv) == 0
    page = (tmp_path / "out/README.md").read_text()
    assert page.index("Protocol `none`") < page.index("| vse |") < page.index("Protocol `image`")
    state = json.loads((tmp_path / "out/seps/seed0/compare.json").read_text())
    assert state["trained"]
    assert state["train_seconds"] > 0
    assert state["parameters"] > 1000
    before = (tmp_path / "out/seps/seed0/results.json").stat().st_mtime_ns
    assert compare.main(argv) == 0
    assert (tmp_path / "out/seps/seed0/results.json").stat().st_mtime_ns == before
