"""End to end through train.main and eval.main on a small `scenes`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluation
import train
from lib.checkpoints.checkpoint import load_model
from lib.methods.registry import method_names
from lib.retrieval.metrics import recall_metrics
from tests.helpers import encode, pair_inputs, tiny_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --tiny_patch_size 16 --embed_size 32 "
    "--tiny_width 32 --tiny_layers 1 --batch_size 16 --workers 0 --log_step 1 --num_epochs 2"
)


def flags(data: Path, folder: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--data_path", str(data), "--logger_name", str(folder), *more]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard scalars of a run folder: tag -> step -> value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def finished(scenes_path, tmp_path_factory) -> Path:
    """A run folder of two whole epochs."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert train.main(flags(scenes_path, folder)) == 0
    return folder


def test_a_run_folder_holds_what_others_rely_on(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {"model_best.pth", "checkpoint_last.pth", "train.log", "Parameters.txt"}
    assert expected | {"args.json", "vocab.txt"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert "method: seps" in (finished / "Parameters.txt").read_text()
    assert json.loads((finished / "args.json").read_text())["batch_size"] == 16


def test_tensorboard_shows_the_training(finished):
    curves = scalars(finished)
    for tag in (
        "train/loss",
        "train/alignment",
        "train/grad_norm",
        "lr/heads",
        "lr/backbones",
        "time/data_s",
        "time/step_s",
        "time/images_per_s",
    ):
        assert sorted(curves[tag]) == list(range(1, 21)), tag
    for direction in ("i2t", "t2i"):
        for name in ("r1", "r5", "r10", "medr", "meanr"):
            assert sorted(curves[f"val/{direction}_{name}"]) == [10, 20]
    assert sorted(curves["val/rsum"]) == [10, 20]
    constant = {"train/ratio", "train/kept_sparse", "train/kept_dense"}  # under a hard top-k
    assert not constant & set(curves)
    events = EventAccumulator(str(finished))
    events.Reload()
    assert "val/kept_patches" in events.Tags()["images"]
    assert "arguments/text_summary" in events.Tags()["tensors"]


def test_checkpoints_hold_tensors_and_plain_data_only(finished):
    for name in ("model_best.pth", "checkpoint_last.pth"):
        payload = torch.load(finished / name, weights_only=True)
        assert payload["format"] == "seps-checkpoint"


def test_evaluation_repeats_the_validation(finished, scenes_path, capsys):
    argv = ["--checkpoint", str(finished / "model_best.pth"), "--data_path", str(scenes_path)]
    assert evaluation.main([*argv, "--split", "dev"]) == 0
    table = json.loads((finished / "results.json").read_text())["scenes_dev"]
    best = torch.load(finished / "model_best.pth", weights_only=True)["best_rsum"]
    assert table["rsum"] == pytest.approx(best, abs=1e-6)
    assert evaluation.main(argv) == 0
    tables = json.loads((finished / "results.json").read_text())
    assert set(tables) == {"scenes", "scenes_dev"}
    facts = tables["scenes"]
    assert (facts["protocol"], facts["dense_side"], facts["val_split"]) == ("image", "image", "dev")
    assert (facts["images"], facts["captions"], facts["method"]) == (16, 80, "seps")
    assert len(facts["checkpoint_sha256"]) == 64
    printed = capsys.readouterr().out
    assert "rSum" in printed
    assert max(len(line) for line in printed.splitlines() if str(finished) not in line) <= 80


def test_the_same_seed_gives_the_same_run(finished, scenes_path, tmp_path):
    assert train.main(flags(scenes_path, tmp_path / "again")) == 0
    first, second = scalars(finished)["train/loss"], scalars(tmp_path / "again")["train/loss"]
    assert first == second
    assert train.main(flags(scenes_path, tmp_path / "other", "--seed", "1")) == 0
    assert scalars(tmp_path / "other")["train/loss"] != first


def test_a_run_is_not_overwritten(finished, scenes_path, capsys):
    assert train.main(flags(scenes_path, finished)) == 2
    assert "--resume" in capsys.readouterr().err


def start(argv: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.02)


def test_kill_9_in_mid_epoch_and_resume_equal_the_uninterrupted_run(scenes_path, tmp_path):
    extra = ["--num_epochs", "6", "--save_step", "7", "--size_augment", "1"]
    assert train.main(flags(scenes_path, tmp_path / "whole", *extra)) == 0
    whole = scalars(tmp_path / "whole")
    folder = tmp_path / "killed"
    process = start(flags(scenes_path, folder, *extra, "--workers", "1"))
    wait_for((folder / "checkpoint_last.pth").exists, process)
    process.kill()
    process.wait()
    saved = torch.load(folder / "checkpoint_last.pth", weights_only=True)["training"]["progress"]
    assert 0 < saved["step"] < 60
    assert train.main(["--resume", str(folder)]) == 0
    resumed = scalars(folder)
    assert resumed["train/loss"] == whole["train/loss"]
    assert resumed["val/rsum"] == whole["val/rsum"]
    ends = [
        torch.load(tmp_path / run / "checkpoint_last.pth", weights_only=True)
        for run in ("whole", "killed")
    ]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    assert ends[0]["best_rsum"] == ends[1]["best_rsum"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(scenes_path, tmp_path, number):
    folder = tmp_path / "run"
    process = start(flags(scenes_path, folder, "--num_epochs", "1000"))
    log = folder / "train.log"
    wait_for(lambda: log.exists() and "step 10 " in log.read_text(), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    progress = torch.load(folder / "checkpoint_last.pth", weights_only=True)["training"]["progress"]
    assert progress["step"] >= 10


def run_two_processes(argv: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, "train.py", "--multi_gpu", "1", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_go_on_where_they_stopped(scenes_path, tmp_path):
    """Gumbel noise differs between ranks, so each must get its own random state back."""
    extra = ["--selection", "gumbel", "--lr_policy", "step", "--workers", "1", "--batch_size", "8"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_two_processes(flags(scenes_path, whole, *extra))
    run_two_processes(flags(scenes_path, halves, *extra, "--num_epochs", "1"))
    run_two_processes(["--resume", str(halves), "--num_epochs", "2"])
    assert scalars(halves)["train/loss"] == scalars(whole)["train/loss"]


def test_two_processes_train_like_one(scenes_path, tmp_path):
    done = run_two_processes(flags(scenes_path, tmp_path / "two", "--batch_size", "8"))
    assert train.main(flags(scenes_path, tmp_path / "one")) == 0
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert one["train/loss"].keys() == two["train/loss"].keys()
    steps = list(range(1, 6))  # later steps amplify float32's rounding
    first = [one["train/loss"][step] for step in steps]
    second = [two["train/loss"][step] for step in steps]
    assert second == pytest.approx(first, rel=1e-4)
    assert done.stdout.count("epoch") >= 1
    events = [p for p in (tmp_path / "two").iterdir() if p.name.startswith("events")]
    assert len(events) == 1  # rank 0 alone writes


def test_overwriting_leaves_nothing_of_the_old_run(scenes_path, tmp_path):
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder)) == 0
    (folder / "results.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    assert train.main(flags(scenes_path, folder, "--overwrite", "1", "--num_epochs", "1")) == 0
    assert not (folder / "results.json").exists()
    assert (folder / "notes.txt").exists()
    assert len(scalars(folder)["train/loss"]) == 10


def test_flags_given_with_resume_are_the_ones_used(scenes_path, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, "--num_epochs", "1")) == 0
    more = "--num_epochs 2 --learning_rate 1e-5 --lr_policy step --lr_warmup_steps 0".split()
    assert train.main(["--resume", str(folder), *more]) == 0
    rates = scalars(folder)["lr/heads"]
    assert rates[20] == pytest.approx(1e-5)
    assert train.main(["--resume", str(folder), "--batch_size", "8"]) == 2
    assert "16 pairs a step" in capsys.readouterr().err
    (folder / "args.json").write_text("{")
    assert train.main(["--resume", str(folder)]) == 2
    assert "args.json" in capsys.readouterr().err


def test_the_rest_of_an_epoch_is_a_step_too(scenes_path, tmp_path):
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, "--grad_accum", "4")) == 0
    rates = scalars(folder)["lr/heads"]  # 10 batches make 3 steps an epoch, under a cosine
    assert sorted(rates) == [1, 2, 3, 4, 5, 6]
    assert rates[6] > 0


def test_processes_can_be_numbered_by_hand(scenes_path, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    argv = flags(scenes_path, tmp_path / "run", "--batch_size", "8", "--num_epochs", "1")
    argv += ["--multi_gpu", "1", "--world_size", "2", "--dist_url", url]
    both = [
        start([*argv, "--rank", str(rank), "--local_rank", str(rank)], OMP_NUM_THREADS="1")
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "2 processes" in outputs[0]
    assert len(scalars(tmp_path / "run")["train/loss"]) == 10


def test_torchruns_restart_goes_on_by_itself(scenes_path, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, "--num_epochs", "1")) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(flags(scenes_path, folder, "--num_epochs", "1")) == 0
    assert "going on at step 10, epoch 1" in (folder / "train.log").read_text()


def test_a_non_finite_loss_stops_with_its_place(scenes_path, tmp_path, monkeypatch, capsys):
    poison_after(monkeypatch, step=12)
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder)) == 3
    message = capsys.readouterr().err
    assert "step 12" in message
    assert "not finite: loss, alignment" in message
    assert "image ids of the batch: " in message
    payload = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    assert all(torch.isfinite(v).all() for v in payload["model"].values() if v.is_floating_point())


def test_skip_nonfinite_tolerates_some_in_a_row(scenes_path, tmp_path, monkeypatch):
    poison_after(monkeypatch, step=12, steps=2)
    argv = flags(scenes_path, tmp_path / "run", "--skip_nonfinite", "2")
    assert train.main(argv) == 0
    assert "step skipped (2 in a row)" in (tmp_path / "run" / "train.log").read_text()
    model, _ = load_model(tmp_path / "run" / "model_best.pth")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def poison_after(monkeypatch, step: int, steps: int = 1000) -> None:
    """Turn the losses of some training steps into NaN."""
    from lib.methods.seps import SEPS

    original, calls = SEPS.losses, []

    def losses(self, *args):
        calls.append(1)
        found = original(self, *args)
        if step < len(calls) <= step + steps:
            found = {
                **found,
                "loss": found["loss"] * float("nan"),
                "alignment": found["alignment"] * float("nan"),
            }
        return found

    monkeypatch.setattr(SEPS, "losses", losses)


@pytest.mark.parametrize(
    "more",
    [
        ["--amp", "bf16"],
        ["--grad_accum", "2"],
        ["--gradient_checkpointing", "1"],
        ["--selection", "gumbel", "--relevance", "topk_mlp", "--lr_policy", "step"],
        ["--dense_side", "caption"],
        ["--dense_side", "none", "--loss", "infonce", "--val_split", "test"],
    ],
    ids=" ".join,
)
def test_options_train_and_evaluate(scenes_path, tmp_path, more):
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, "--num_epochs", "1", *more)) == 0
    argv = ["--checkpoint", str(folder / "model_best.pth"), "--data_path", str(scenes_path)]
    assert evaluation.main(argv) == 0
    table = json.loads((folder / "results.json").read_text())["scenes"]
    assert table["val_split"] == ("test" if "test" in more else "dev")
    oracle = "caption" in more
    assert (table["protocol"] == "oracle") == oracle


@pytest.mark.parametrize("method", [name for name in method_names() if name != "seps"])
def test_every_other_method_trains_evaluates_and_goes_on(scenes_path, tmp_path, method):
    folder = tmp_path / "run"
    argv = flags(scenes_path, folder, "--method", method, "--warmup", "4", "--nhead", "4")
    assert train.main([*argv, "--num_epochs", "1"]) == 0
    assert train.main(["--resume", str(folder), "--num_epochs", "2"]) == 0
    curves = scalars(folder)
    assert sorted(curves["train/loss"]) == list(range(1, 21))
    assert all(np.isfinite(value) for value in curves["train/loss"].values())
    argv = ["--checkpoint", str(folder / "model_best.pth"), "--data_path", str(scenes_path)]
    assert evaluation.main(argv) == 0
    table = json.loads((folder / "results.json").read_text())["scenes"]
    assert table["method"] == method
    oracle, image = {"seps_released"}, {"dense_text"}
    assert table["protocol"] == (
        "oracle" if method in oracle else "image" if method in image else "none"
    )


def test_overfits_sixteen_pairs():
    """A working model learns 16 image-caption pairs by heart: rSum 600."""
    model, inputs = tiny_model(shard_size=16), pair_inputs(16)
    inputs["image_ids"] = torch.arange(16)
    inputs["pixels"][-1] = 255 - inputs["pixels"][0]
    assert fitted_rsum(model, inputs) == 600


def test_shuffled_captions_leave_recall_at_chance():
    """Trained on wrong pairs, a model is at chance on the right ones: nothing leaks around them."""
    inputs = pair_inputs(16)
    inputs["image_ids"] = torch.arange(16)
    inputs["pixels"][-1] = 255 - inputs["pixels"][0]
    order = torch.roll(torch.arange(16), 5)
    shuffled = {**inputs, "ids": inputs["ids"][order], "lengths": inputs["lengths"][order]}
    model = tiny_model(shard_size=16)
    assert fitted_rsum(model, shuffled) == 600
    with torch.no_grad():
        right = model.eval().similarity(*encode(model, inputs)).numpy()
    assert recall_metrics(right, captions_per_image=1)["i2t"]["r1"] <= 100 * 3 / 16


def fitted_rsum(model, inputs: dict, steps: int = 150) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train().training_losses(**inputs)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    with torch.no_grad():
        similarity = model.eval().similarity(*encode(model, inputs)).numpy()
    return recall_metrics(similarity, captions_per_image=1)["rsum"]


def test_undecodable_images_are_left_out_and_counted(scenes_path, tmp_path, capsys):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(scenes_path, data)
    files = sorted((data / "scenes" / "images").iterdir())
    for path in files[:2]:
        path.write_bytes(b"no picture")
    files[2].write_bytes(files[2].read_bytes()[:-200])  # cut off
    folder = tmp_path / "run"
    assert train.main(flags(data, folder)) == 0
    log = (folder / "train.log").read_text()
    assert log.count("can't be decoded; its pairs are left out") == 3
    assert "epoch 1: 3 images could not be decoded and were left out" in log
    assert "epoch 2: 3 images could not be decoded and were left out" in log
    argv = flags(data, tmp_path / "strict", "--max_bad_images", "2")
    assert train.main(argv) == 2
    assert "--max_bad_images 2" in capsys.readouterr().err


def test_saved_similarity_gives_the_table(finished, scenes_path, tmp_path):
    out = tmp_path / "similarity.npy"
    argv = ["--checkpoint", str(finished / "model_best.pth"), "--data_path", str(scenes_path)]
    assert evaluation.main([*argv, "--save_similarity", str(out)]) == 0
    table = json.loads((finished / "results.json").read_text())["scenes"]
    assert recall_metrics(np.load(out))["rsum"] == pytest.approx(table["rsum"])
