"""Every recipe parses as written; each is started for two steps on made data, small encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import train
from arguments import parse_train
from lib.checkpoints.payloads import read_payload
from lib.methods.registry import method_names

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALL = (
    "--vit_type tiny --bert_path tiny --img_res 32 --tiny_patch_size 8 --tiny_width 32 "
    "--tiny_layers 1 --embed_size 64 --batch_size 4 --num_epochs 1 --workers 0 --precomp 0"
).split()
FIRST = {yaml.safe_load(path.read_text())["method"]: path for path in reversed(RECIPES)}


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_is_what_its_name_says(path):
    args = parse_train(["--config", str(path)])
    dataset, method, encoder, *_ = path.stem.split("_")
    assert (args.dataset, args.method) == (dataset, method)
    assert args.logger_name == f"runs/{path.stem}"
    if encoder != "regions":
        assert args.vit_type == f"{encoder[:-3]}_{encoder[-3:]}"
    given = yaml.safe_load(path.read_text())
    assert {key: getattr(args, key) for key in given} == given


def test_every_row_has_its_file():
    stems = {path.stem for path in RECIPES}
    for dataset in ("f30k", "coco"):
        for method in ("vse", "scan", "sgr", "chan", "laps", "avse", "seps"):
            for encoder in ("vit224", "vit384", "swin224", "swin384"):
                assert f"{dataset}_{method}_{encoder}" in stems
    assert FIRST.keys() <= set(method_names())


def started(path: Path, layouts: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    words = ["--config", str(path), "--data_path", str(layouts), *SMALL]
    given = yaml.safe_load(path.read_text())
    if given.get("weight_path"):  # stage 2 begins with what stage 1 left
        first = path.with_name(path.name.replace("distill", "pretrain"))
        assert train.main(["--config", str(first), *words[2:]]) == 0
    assert train.main(words) == 0
    assert read_payload(folder / given["logger_name"] / "checkpoint_last.pth")["step"] >= 2


@pytest.mark.parametrize("path", FIRST.values(), ids=name)
def test_a_recipe_of_each_method_starts(path, layouts, tmp_path, monkeypatch):
    started(path, layouts, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(set(RECIPES) - set(FIRST.values())), ids=name)
def test_every_other_recipe_starts(path, layouts, tmp_path, monkeypatch):
    started(path, layouts, tmp_path, monkeypatch)
