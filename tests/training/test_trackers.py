"""--report_to: curves go to every tracker named, and a missing package is one sentence."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import train
from lib.errors import InputError
from lib.training.trackers import run_id, tracker_names

RUN = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    "--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1 --method laps"
).split()


class Package:
    """Stands for wandb or trackio; keeps what it is told."""

    def __init__(self) -> None:
        self.calls = []
        self.config = {}
        self.Image = lambda picture: picture.shape

    def init(self, **settings):
        self.calls.append(("init", settings))
        return SimpleNamespace(config=self.config)

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finish", None))


def test_names_are_checked_before_anything_is_loaded(monkeypatch):
    assert tracker_names("tensorboard") == ["tensorboard"]
    assert tracker_names("none") == tracker_names("") == []
    with pytest.raises(InputError, match="--report_to mlflow: give some of tensorboard, wandb"):
        tracker_names("tensorboard,mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--report_to wandb: the package is not installed"):
        tracker_names("wandb")


def test_a_run_reports_to_all_it_is_told(scenes_path, tmp_path, monkeypatch):
    packages = {name: Package() for name in ("wandb", "trackio")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    run = tmp_path / "my_run"
    places = ["--data_path", str(scenes_path), "--logger_name", str(run)]
    assert train.main([*RUN, *places, "--report_to", "tensorboard,wandb,trackio"]) == 0
    assert list(run.glob("events.out*"))
    for package in packages.values():
        (first, settings), *told, (last, _) = package.calls
        assert (first, last) == ("init", "finish")
        assert settings["project"] == "seps"
        names = {name for _, values in told for name in values}
        assert {"train/loss", "val/rsum"} <= names, sorted(names)
        assert package.config["batch_size"] == 16
    wandb, trackio = (packages[name].calls[0][1] for name in ("wandb", "trackio"))
    assert (wandb["name"], len(wandb["id"])) == ("my_run", 16)
    assert trackio["name"] == f"my_run-{wandb['id'][:8]}"  # trackio has no ids
    assert train.main(["--resume", str(run), "--num_epochs", "2"]) == 0
    again = [settings for name, settings in packages["wandb"].calls if name == "init"]
    assert again == [wandb, wandb]


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    for place in "ab":
        (tmp_path / place / "run").mkdir(parents=True)
    first, other = (run_id(tmp_path / place / "run", 0) for place in "ab")
    assert first != other
    assert run_id(tmp_path / "a/run", 10) == first
    assert run_id(tmp_path / "a/run", 0) != first  # begun anew


def test_a_service_that_fails_later_ends_no_run(scenes_path, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("the service is gone")

    package = Package()
    package.log = package.finish = fail
    monkeypatch.setitem(sys.modules, "wandb", package)
    places = ["--data_path", str(scenes_path), "--logger_name", str(tmp_path / "run")]
    assert train.main([*RUN, *places, "--report_to", "tensorboard,wandb"]) == 0
    told = "warning: wandb: records can't be written (the service is gone)"
    assert capsys.readouterr().err.count(told) == 1
    package.init = fail
    places[-1] += "2"
    assert train.main([*RUN, *places, "--report_to", "wandb"]) == 2
    assert "--report_to wandb: no run can be opened there" in capsys.readouterr().err


def test_none_leaves_no_events(scenes_path, tmp_path):
    places = ["--data_path", str(scenes_path), "--logger_name", str(tmp_path / "run")]
    assert train.main([*RUN, *places, "--report_to", "none"]) == 0
    assert not list((tmp_path / "run").glob("events.out*"))
