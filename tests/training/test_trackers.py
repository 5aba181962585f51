"""--report_to: curves go to every tracker named, and a missing package is one sentence."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import train
from lib.errors import InputError
from lib.training.trackers import tracker_names

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
        assert (settings["project"], settings["name"]) == ("seps", "my_run")
        names = {name for _, values in told for name in values}
        assert {"train/loss", "val/rsum"} <= names, sorted(names)
        assert package.config["batch_size"] == 16
    assert packages["wandb"].calls[0][1]["id"] == "my_run"


def test_none_leaves_no_events(scenes_path, tmp_path):
    places = ["--data_path", str(scenes_path), "--logger_name", str(tmp_path / "run")]
    assert train.main([*RUN, *places, "--report_to", "none"]) == 0
    assert not list((tmp_path / "run").glob("events.out*"))
