"""Runs that are cut short or can't learn: nothing is lost, and nothing is claimed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from lib.errors import WorkerError
from lib.methods.seps import SEPS
from lib.training import engine, saving, setup
from tests.test_train import ROOT, flags, run_two_processes, scalars, start, wait_for

ONE_EPOCH = ("--num_epochs", "1")


@pytest.fixture
def data(scenes_path, tmp_path) -> Path:
    """A copy of the data that a test may spoil."""
    shutil.copytree(scenes_path, tmp_path / "data")
    return tmp_path / "data"


def images_of(data: Path, split: str) -> list[Path]:
    ids = dict.fromkeys((data / "scenes" / f"{split}_ids.txt").read_text().split())
    names = json.loads((data / "scenes" / "id_mapping.json").read_text())
    return [data / "scenes" / "images" / names[one] for one in ids]


def saved(folder: Path) -> dict:
    return torch.load(folder / "checkpoint_last.pth", weights_only=True)["training"]["progress"]


def break_at(monkeypatch, call: int, error: Exception) -> None:
    """Let the losses of one training step raise."""
    original, calls = SEPS.losses, []

    def losses(self, *args):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(self, *args)

    monkeypatch.setattr(SEPS, "losses", losses)


# --- what was trained is kept ----------------------------------------------------------------


def test_a_bad_validation_image_costs_no_step(data, tmp_path, capsys):
    image = images_of(data, "dev")[10]
    whole = image.read_bytes()
    image.write_bytes(b"")
    folder = tmp_path / "run"
    assert train.main(flags(data, folder, *ONE_EPOCH)) == 2
    assert str(image) in capsys.readouterr().err
    assert (saved(folder)["step"], saved(folder)["validation_due"]) == (10, True)
    image.write_bytes(whole)
    assert train.main(["--resume", str(folder)]) == 0  # the validation that failed comes first
    assert sorted(scalars(folder)["val/rsum"]) == [10]
    assert saved(folder)["best_rsum"] > 0


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault of the program"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_what_nobody_foresaw_costs_no_step(scenes_path, tmp_path, monkeypatch, error, capsys):
    break_at(monkeypatch, 8, error)
    folder = tmp_path / "run"
    argv = flags(scenes_path, folder, *ONE_EPOCH)
    if isinstance(error, torch.OutOfMemoryError):
        assert train.main(argv) == 1
        assert "out of memory" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="a fault of the program"):
            train.main(argv)
    assert (saved(folder)["step"], saved(folder)["batch"]) == (7, 7)
    monkeypatch.undo()
    assert train.main(["--resume", str(folder)]) == 0
    assert sorted(scalars(folder)["train/loss"]) == list(range(1, 11))


def test_a_killed_worker_costs_no_step(scenes_path, tmp_path, monkeypatch, capsys):
    def batches(self, epoch, start_step=0):
        for number, item in enumerate(original(self, epoch, start_step)):
            if number == 6:
                raise WorkerError("a loader worker was killed")
            yield item

    original = train.training_loader.__globals__["TrainLoader"].batches
    monkeypatch.setattr("lib.data.loaders.TrainLoader.batches", batches)
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, *ONE_EPOCH)) == 1
    assert "a loader worker was killed" in capsys.readouterr().err
    assert saved(folder)["step"] == 6
    assert "saved step 6" in (folder / "train.log").read_text()


def test_a_loss_that_is_not_finite_before_any_checkpoint(
    scenes_path, tmp_path, monkeypatch, capsys
):
    original, calls = SEPS.losses, []

    def losses(self, *args):
        calls.append(1)
        found = original(self, *args)
        return {**found, "loss": found["loss"] * float("nan")} if len(calls) >= first else found

    monkeypatch.setattr(SEPS, "losses", losses)
    first = 1
    assert train.main(flags(scenes_path, tmp_path / "at_once")) == 3
    assert "there is no checkpoint to go on from" in capsys.readouterr().err
    assert not (tmp_path / "at_once" / "checkpoint_last.pth").exists()
    calls.clear()
    first = 6
    assert train.main(flags(scenes_path, tmp_path / "later")) == 3
    assert "the checkpoint of step 5 is kept" in capsys.readouterr().err
    assert saved(tmp_path / "later")["step"] == 5


def test_the_training_state_is_written_on_save_step_alone(scenes_path, tmp_path, monkeypatch):
    written, write = [], saving.save_payload

    def noted(path, payload):
        written.append((path.name, payload["step"]))
        write(path, payload)

    monkeypatch.setattr(saving, "save_payload", noted)
    argv = flags(scenes_path, tmp_path / "run", "--val_step", "4", "--save_step", "7")
    assert train.main(argv) == 0
    last = [step for name, step in written if name == "checkpoint_last.pth"]
    assert last == [4, 7, 14, 20]  # before the first validation, on save_step, at the end


def test_a_checkpoint_that_can_not_be_written_stops_the_run(
    scenes_path, tmp_path, monkeypatch, capsys
):
    def full(path, payload):
        raise OSError(f"{path}: the checkpoint could not be written (No space left on device)")

    monkeypatch.setattr(saving, "save_payload", full)
    assert train.main(flags(scenes_path, tmp_path / "run", "--save_step", "3")) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(scalars(tmp_path / "run")["train/loss"]) < 20


def test_overwriting_destroys_nothing_before_the_new_run_can_begin(scenes_path, tmp_path):
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, *ONE_EPOCH)) == 0
    before = (folder / "model_best.pth").read_bytes()
    bad = flags(tmp_path / "nowhere", folder, "--overwrite", "1", "--dataset", "f30k")
    assert train.main(bad) == 2
    assert (folder / "model_best.pth").read_bytes() == before


# --- "done" is for runs that learnt ----------------------------------------------------------


def refused(argv: list[str], folder: Path, capsys) -> str:
    assert train.main(argv) == 2
    printed = capsys.readouterr()
    assert "best rSum" not in printed.out
    assert not (folder / "model_best.pth").exists()
    return printed.err


def test_no_readable_image_is_no_training(data, tmp_path, capsys):
    for image in images_of(data, "train"):
        image.write_bytes(b"no picture")
    folder = tmp_path / "run"
    told = refused(flags(data, folder, "--val_step", "2"), folder, capsys)
    assert "nothing was learnt in 0 steps: 32 images can't be decoded" in told


def test_pairs_of_one_image_alone_are_no_training(data, tmp_path, capsys):
    for image in images_of(data, "train")[1:]:
        image.write_bytes(b"no picture")
    folder = tmp_path / "run"
    told = refused(flags(data, folder, "--val_step", "1"), folder, capsys)
    assert "a batch needs pairs of two images or more" in told


def test_a_batch_of_one_is_no_training(scenes_path, tmp_path, capsys):
    folder = tmp_path / "run"
    told = refused(flags(scenes_path, folder, "--batch_size", "1"), folder, capsys)
    assert "--batch_size 1" in told


def test_captions_of_one_image_are_no_training(data, tmp_path, capsys):
    for kind in ("caps", "ids"):
        path = data / "scenes" / f"train_{kind}.txt"
        path.write_text("\n".join(path.read_text().splitlines()[:5]) + "\n")
    folder = tmp_path / "run"
    argv = flags(data, folder, "--method", "laps", "--batch_size", "4")
    assert "one image alone" in refused(argv, folder, capsys)


# --- going on with what it was ---------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(scenes_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ended"
    assert train.main(flags(scenes_path, folder, *ONE_EPOCH)) == 0
    return folder


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--seed", "5"], "seed 5 (was 0)"),
        (["--method", "laps"], "method laps (was seps)"),
        (["--logger_name", "elsewhere"], "leave --logger_name out"),
        (["--val_split", "test", "--dataset", "f30k"], None),
    ],
)
def test_a_run_goes_on_as_what_it_was(ended, more, told, capsys):
    assert train.main(["--resume", str(ended), *more]) == 2
    if told:
        assert told in capsys.readouterr().err


def test_a_checkpoint_holds_the_datas_fingerprint(ended):
    data = torch.load(ended / "checkpoint_last.pth", weights_only=True)["data"]
    assert (data["images"], data["captions"], data["split"]) == (32, 160, "train")
    assert len(data["captions_sha256"]) == 64


def test_a_run_that_held_images_out_goes_on(layouts, tmp_path, monkeypatch, capsys):
    """Its dev split has no dense texts, so training images choose the checkpoint, to the end."""

    def stop(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args)

    losses, folder = SEPS.losses, tmp_path / "run"
    monkeypatch.setattr(SEPS, "losses", stop)
    tiny = "--dataset f30k --vit_type tiny --bert_path tiny".split()
    assert train.main(flags(layouts, folder, *tiny)) == 130
    assert json.loads((folder / "args.json").read_text())["val_split"] == "held_out"
    monkeypatch.undo()
    assert train.main(["--resume", str(folder)]) == 0, capsys.readouterr().err
    assert (saved(folder)["step"], saved(folder)["validation_due"]) == (4, False)
    assert torch.load(folder / "model_best.pth", weights_only=True)["val_split"] == "held_out"
    assert train.main(["--resume", str(folder), "--val_split", "held_out"]) == 2
    assert "--val_split" in capsys.readouterr().err


def test_a_run_without_its_last_checkpoint_keeps_its_best(ended, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(ended, folder)
    (folder / "checkpoint_last.pth").unlink()
    before = (folder / "model_best.pth").read_bytes()
    assert train.main(["--resume", str(folder), "--num_epochs", "2"]) == 2
    assert "no checkpoint_last.pth" in capsys.readouterr().err
    assert (folder / "model_best.pth").read_bytes() == before


def test_changed_captions_are_told_with_both_counts(data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(flags(data, folder, *ONE_EPOCH, "--method", "laps")) == 0
    captions = data / "scenes" / "train_caps.txt"
    lines = captions.read_text().splitlines()
    captions.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    assert train.main(["--resume", str(folder), "--num_epochs", "2"]) == 2
    assert "the captions' words or order" in capsys.readouterr().err


# --- one agreement a step, signals, terminals ------------------------------------------------


def test_a_step_agrees_once(scenes_path, tmp_path, monkeypatch):
    calls, agree = [], engine.sum_over_ranks

    def counted(counts, device):
        calls.append(len(counts))
        return agree(counts, device)

    monkeypatch.setattr(engine, "sum_over_ranks", counted)
    argv = flags(scenes_path, tmp_path / "run", "--grad_accum", "4", "--log_step", "100")
    assert train.main(argv) == 0
    assert calls == [4 + 4] * 6  # stop, fault, unwritten, bad, and four batches; six steps


@pytest.mark.parametrize("asked", [True, False])
def test_workers_that_a_signal_ended_in_validation(scenes_path, tmp_path, monkeypatch, asked):
    def evaluate(*_):
        if asked:  # a scheduler's signal, which the loader workers obey at once
            os.kill(os.getpid(), signal.SIGTERM)
        raise WorkerError("the loader workers were ended from outside")

    monkeypatch.setattr(engine, "evaluate_split", evaluate)
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, "--val_step", "5")) == (130 if asked else 1)
    assert (saved(folder)["step"], saved(folder)["validation_due"]) == (5, True)


def test_no_compiler_is_told_and_done_without(scenes_path, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "_compiler_fault", lambda device: "no working C++ compiler")
    folder = tmp_path / "run"
    assert train.main(flags(scenes_path, folder, *ONE_EPOCH, "--compile", "1")) == 0
    assert (
        "--compile 1: this machine can't compile (no working" in (folder / "train.log").read_text()
    )


@pytest.mark.slow
def test_the_probe_finds_that_there_is_no_compiler(scenes_path, tmp_path):
    folder = tmp_path / "run"
    argv = flags(scenes_path, folder, *ONE_EPOCH, "--compile", "1")
    process = start(argv, CXX="/nowhere/g++", CC="/nowhere/gcc", PATH="/nowhere")
    assert process.wait(240) == 0, process.communicate()[0]
    assert "this machine can't compile" in (folder / "train.log").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is loaded from /proc")
@pytest.mark.parametrize("program", [["train.py"], ["eval.py"], ["-m", "tools.search"]])
def test_ctrl_c_while_the_libraries_load_gives_no_traceback(program):
    process = subprocess.Popen(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    mapped = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in mapped.read_text(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    assert process.returncode in (-signal.SIGINT, 130), output


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(scenes_path, tmp_path):
    """The one that is not told must not wait for the other's gradients."""
    folder = tmp_path / "run"
    argv = [*flags(scenes_path, folder, "--batch_size", "8", "--workers", "1"), "--multi_gpu", "1"]
    argv += ["--world_size", "2", "--num_epochs", "5000", "--dist_url", "tcp://127.0.0.1:29577"]
    both = [start([*argv, "--rank", str(rank)], OMP_NUM_THREADS="1") for rank in range(2)]
    log = folder / "train.log"
    wait_for(lambda: log.exists() and "step 10 " in log.read_text(), both[0])
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [130, 130], outputs
    assert saved(folder)["step"] >= 10


@pytest.mark.slow
def test_a_killed_process_costs_the_other_no_step(scenes_path, tmp_path):
    folder = tmp_path / "run"
    argv = [*flags(scenes_path, folder, "--batch_size", "8"), "--multi_gpu", "1"]
    argv += ["--world_size", "2", "--num_epochs", "5000", "--dist_url", "tcp://127.0.0.1:29578"]
    argv += ["--val_step", "100000", "--save_step", "100000"]
    both = [start([*argv, "--rank", str(rank)], OMP_NUM_THREADS="1") for rank in range(2)]
    log = folder / "train.log"
    wait_for(lambda: log.exists() and "step 30 " in log.read_text(), both[0])
    both[1].kill()
    output = both[0].communicate(timeout=120)[0]
    assert both[0].returncode == 1, output
    assert "another process of this run ended" in output
    assert "Traceback" not in output
    assert saved(folder)["step"] >= 30  # --save_step alone would have kept the first 10
    both[1].communicate()


@pytest.mark.slow
def test_more_processes_than_validation_images(data, tmp_path):
    for kind in ("caps", "ids"):
        path = data / "scenes" / f"dev_{kind}.txt"
        path.write_text("\n".join(path.read_text().splitlines()[:1]) + "\n")
    argv = flags(data, tmp_path / "run", "--method", "laps", "--batch_size", "8", *ONE_EPOCH)
    run_two_processes(argv)
    assert (tmp_path / "run" / "model_best.pth").exists()
