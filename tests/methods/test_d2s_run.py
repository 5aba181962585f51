"""D2S-VSE's two stages, and a GRU's words, through train.main and eval.main."""

from __future__ import annotations

import json

import pytest
import torch

import eval as evaluation
import train
from lib.checkpoints.checkpoint import load_model
from tests.test_train import flags
from vocab import CAPTION_TOKENS

STAGE_1 = ("--method", "d2s", "--pretrain", "--num_epochs", "1")
STAGE_2 = "--method d2s --distill --use_decoder --num_tokens 5 --decoder_depth 1".split()


@pytest.fixture(scope="module")
def stage_1(scenes_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("d2s") / "pretrain"
    assert train.main(flags(scenes_path, folder, *STAGE_1)) == 0
    return folder


def stage_2(scenes_path, stage_1, folder, *more: str) -> int:
    start = ["--weight_path", str(stage_1 / "model_best.pth"), "--lr_policy", "step"]
    return train.main(flags(scenes_path, folder, *STAGE_2, *start, *more))


def results(folder, scenes_path) -> dict:
    checkpoint = str(folder / "model_best.pth")
    arguments = ["--checkpoint", checkpoint, "--data_path", str(scenes_path), "--workers", "0"]
    assert evaluation.main(arguments) == 0
    (table,) = json.loads((folder / "results.json").read_text()).values()
    return table


def test_stage_1_takes_a_pair_an_image_and_is_a_model(stage_1, scenes_path, capsys):
    assert "2 steps an epoch" in (stage_1 / "train.log").read_text()  # of 32 images, not captions
    table = results(stage_1, scenes_path)
    assert (table["protocol"], table["trained_on_dense"]) == ("none", True)
    assert "dense texts in training alone" in capsys.readouterr().out


def test_stage_2_starts_from_stage_1_and_goes_on_as_if_never_stopped(
    stage_1, scenes_path, tmp_path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert stage_2(scenes_path, stage_1, whole, "--num_epochs", "2") == 0
    assert stage_2(scenes_path, stage_1, stopped, "--num_epochs", "1") == 0
    assert train.main(["--resume", str(stopped), "--num_epochs", "2"]) == 0
    ends = [
        torch.load(run / "checkpoint_last.pth", weights_only=True)["model"]
        for run in (whole, stopped)
    ]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    first, _ = load_model(stage_1 / "model_best.pth")
    for name, value in first.text_encoder.state_dict().items():
        assert torch.equal(value, ends[0][f"teacher.encoder.{name}"]), name
    words = [(run / "vocab.txt").read_text() for run in (stage_1, whole)]
    assert words[0] == words[1]
    assert results(whole, scenes_path)["trained_on_dense"] is True


def test_a_checkpoint_of_another_network_or_method_is_one_sentence(
    stage_1, scenes_path, tmp_path, capsys
):
    assert stage_2(scenes_path, stage_1, tmp_path / "a", "--embed_size", "16") == 2
    assert "is of another network: give the --vit_type" in capsys.readouterr().err
    assert stage_2(scenes_path, tmp_path, tmp_path / "b") == 2
    assert "model_best.pth: no such file" in capsys.readouterr().err


def test_runs_below_the_name_of_the_data_set_are_found(stage_1, scenes_path, tmp_path):
    folder = tmp_path / "scenes" / "vit_224" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "model_best.pth").write_bytes((stage_1 / "model_best.pth").read_bytes())
    where = ["--runs", str(tmp_path), "--data_path", str(scenes_path), "--workers", "0"]
    assert evaluation.main(["--dataset", "scenes", *where]) == 0
    assert (folder / "results.json").exists()


def test_a_gru_learns_its_words_keeps_them_and_goes_on(scenes_path, tmp_path):
    more = "--method vse --text_encoder gru --word_dim 8 --lr_policy step".split()
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(flags(scenes_path, whole, *more, "--num_epochs", "2")) == 0
    assert train.main(flags(scenes_path, stopped, *more, "--num_epochs", "1")) == 0
    words = (stopped / "vocab.txt").read_text().splitlines()
    assert tuple(words[:4]) == CAPTION_TOKENS
    assert train.main(["--resume", str(stopped), "--num_epochs", "2"]) == 0
    ends = [
        torch.load(run / "checkpoint_last.pth", weights_only=True)["model"]
        for run in (whole, stopped)
    ]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    assert results(stopped, scenes_path)["trained_on_dense"] is False
