"""A model as a folder: written, loaded everywhere a file is, fetched from and pushed to a hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from lib.checkpoints import load_model
from lib.checkpoints.hub import checkpoint_file, read_folder, write_folder
from lib.checkpoints.payloads import read_payload
from lib.errors import InputError
from tools import convert_checkpoint
from vocab import checkpoint_tokenizer

RUN = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    "--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1 --method laps"
).split()


@pytest.fixture(scope="module")
def run(scenes_path, tmp_path_factory) -> Path:
    """A finished run with its results."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    places = ["--data_path", str(scenes_path), "--logger_name", str(folder)]
    assert train.main([*RUN, *places]) == 0
    data = ["--data_path", str(scenes_path)]
    assert evaluation.main(["--checkpoint", str(folder / "model_best.pth"), *data]) == 0
    return folder


@pytest.fixture(scope="module")
def model_folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "model"
    assert convert_checkpoint.main([str(run / "model_best.pth"), str(out)]) == 0
    return out


def test_a_folder_holds_what_the_file_holds(run, model_folder):
    names = {path.name for path in model_folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.txt", "README.md"}
    file, folder = read_payload(run / "model_best.pth"), read_payload(model_folder)
    assert folder["vocabulary"] == file["vocabulary"]
    assert folder["image_config"] == file["image_config"]
    assert folder["epoch"] == file["epoch"]
    assert all(torch.equal(folder["model"][key], file["model"][key]) for key in file["model"])
    first, _ = load_model(run / "model_best.pth")
    again, args = load_model(model_folder)
    assert args.method == "laps"
    assert not again.training
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(again.encode_images(pixels).local, first.encode_images(pixels).local)


def test_the_card_says_method_protocol_data_and_results(run, model_folder):
    card = (model_folder / "README.md").read_text()
    row = json.loads((run / "results.json").read_text())
    name, table = next((k, v) for k, v in row.items() if isinstance(v, dict) and "rsum" in v)
    assert f"| {name} | none |" in card
    assert f"{table['rsum']:.1f} |" in card
    assert "| method | `laps` |" in card
    assert "| data | scenes |" in card
    assert card.startswith("---\nlibrary_name: pytorch")
    config = (model_folder / "config.json").read_text()
    assert str(run) not in config  # no path of this machine's runs


def test_evaluation_takes_a_model_s_and_a_run_s_folder(run, model_folder, scenes_path, tmp_path):
    matrices = []
    for number, checkpoint in enumerate([model_folder, run]):
        out = tmp_path / f"{number}.npy"
        flags = ["--checkpoint", str(checkpoint), "--save_similarity", str(out)]
        assert evaluation.main([*flags, "--data_path", str(scenes_path)]) == 0
        matrices.append(np.load(out))
    assert np.array_equal(*matrices)
    assert (model_folder / "results.json").exists()
    (model_folder / "results.json").unlink()


def test_another_s_tokenizer_travels_with_the_model(tmp_path, model_folder):
    from tokenizers import Tokenizer, models

    pieces = {
        "tokenizer": Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str(),
        "pad": 1,
        "mask": None,
        "special": [1],
        "longest": 20,
    }
    write_folder(tmp_path / "out", {**read_folder(model_folder), "vocabulary": pieces})
    payload = read_payload(tmp_path / "out")
    assert payload["vocabulary"] == pieces
    assert checkpoint_tokenizer(payload, "nowhere").encode("a", 9) == [0]
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]


def test_a_folder_of_the_last_checkpoint_goes_on(run, scenes_path, tmp_path, capsys):
    out = tmp_path / "model"
    assert convert_checkpoint.main([str(run / "checkpoint_last.pth"), str(out)]) == 0
    places = ["--resume", str(out), "--data_path", str(scenes_path), "--num_epochs", "2"]
    assert train.main(places) == 0
    assert "going on at step 10" in capsys.readouterr().out
    assert read_payload(out / "checkpoint_last.pth")["step"] == 20


def test_files_and_folders_convert_both_ways(model_folder, tmp_path):
    file = tmp_path / "model.pth"
    assert convert_checkpoint.main([str(model_folder), str(file)]) == 0
    assert convert_checkpoint.main([str(file), str(tmp_path / "again")]) == 0
    first, again = read_payload(model_folder), read_payload(tmp_path / "again")
    assert first["model"].keys() == again["model"].keys()
    assert first["vocabulary"] == again["vocabulary"]


def test_what_can_not_be_converted_is_refused(model_folder, tmp_path, capsys):
    assert convert_checkpoint.main([str(model_folder), str(model_folder)]) == 2
    assert "is the input itself" in capsys.readouterr().err
    assert convert_checkpoint.main([str(model_folder), str(tmp_path / "x.ckpt")]) == 2
    assert "end the name in .pth or .safetensors, or name a folder" in capsys.readouterr().err
    flags = [str(model_folder), str(tmp_path / "x.pth"), "--push_to_hub", "me/x"]
    assert convert_checkpoint.main(flags) == 2
    assert "--push_to_hub uploads a folder" in capsys.readouterr().err


def test_folders_that_hold_no_model_are_refused(tmp_path, model_folder):
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor model_best\.pth"):
        load_model(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"model.safetensors: not readable"):
        load_model(broken)


# --- a hub -------------------------------------------------------------------------------------


def test_only_a_name_that_is_nothing_here_asks_the_hub(model_folder, tmp_path, monkeypatch):
    asked = []

    def download(hub_id, allow_patterns):
        asked.append(hub_id)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/x", "x.pth", "somebody/model.pth", "./a/b", "a/b/c", "plain"):
        assert checkpoint_file(name) == Path(name)
        with pytest.raises(InputError, match="no such file"):
            load_model(name)
    assert asked == []
    assert load_model("somebody/laps-f30k")[1].method == "laps"
    assert asked == ["somebody/laps-f30k"]


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    def download(*_, **__):
        raise OSError("We couldn't connect\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(InputError, match=r"some/model: neither .* \(We couldn't connect\)"):
        load_model("some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
        load_model("some/model")


def test_pushing_uploads_the_model_and_not_the_training_state(run, tmp_path, monkeypatch, capsys):
    uploaded = {}

    class Api:
        def create_repo(self, hub_id, exist_ok):
            return f"https://hub/{hub_id}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            names = {path.name for path in Path(folder_path).iterdir()}
            uploaded[repo_id] = names & set(allow_patterns)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    flags = [str(run / "checkpoint_last.pth"), str(tmp_path / "out"), "--push_to_hub", "me/laps"]
    assert convert_checkpoint.main(flags) == 0
    names = {"config.json", "model.safetensors", "vocab.txt", "README.md"}
    assert uploaded == {"me/laps": names}
    assert "uploaded to https://hub/me/laps" in capsys.readouterr().out


def test_torch_hub_loads_a_folder(model_folder):
    root = str(Path(__file__).parents[2])
    model, args = torch.hub.load(root, "load", source="local", checkpoint=str(model_folder))
    assert (model.name, args.dataset) == ("laps", "scenes")
