"""What a GPU does by itself, in bodies that a CPU runs too: `pytest -m gpu` where a GPU is.

Without a mark the quick bodies run on the CPU, the long ones under `slow`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import train
from lib import distributed
from lib.methods.registry import method_names
from lib.model import compiled, kernels, native, native_gradients
from lib.model.precision import autocast_for
from lib.training.optim import build_optimizer
from lib.training.update import LOWEST_LOSS_SCALE, Update
from tests.data.test_features import RUN
from tests.helpers import encode, pair_inputs, random_tokens, tiny_model
from tests.model.test_kernels import PROGRAMS, Launched
from tests.test_imports import ROOT
from tests.test_train import flags, scalars
from tests.training.test_distributed import free_port
from tools.benchmark.__main__ import main as benchmark
from tools.benchmark.cases import Case, call_of
from tools.benchmark.similarity import peak_memory

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
QUICK = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
LONG = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA], indirect=True
)
SIZES = [196, 576, 49, 144]  # ViT-224, ViT-384, Swin-224, Swin-384


@pytest.fixture
def device(request, monkeypatch) -> torch.device:
    """The device that a test asks for; the programs take it too."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param, *([0] if request.param == "cuda" else []))


def evaluated(run, data, *more: str, name: str = "scenes") -> dict:
    """An entry of the results of a run's best checkpoint, after eval.main."""
    argv = ["--checkpoint", str(run / "model_best.pth"), "--data_path", str(data), "--workers", "0"]
    assert evaluation.main([*argv, *more]) == 0
    return json.loads((run / "results.json").read_text())[name]


# --- training and evaluation ---------------------------------------------------------------------


@LONG
@pytest.mark.parametrize("method", method_names())
def test_every_method_trains_goes_on_and_evaluates(method, device, scenes_path, tmp_path):
    run = tmp_path / "run"
    argv = flags(scenes_path, run, "--method", method, "--warmup", "4", "--nhead", "4")
    assert train.main([*argv, "--num_epochs", "1", "--workers", "1"]) == 0
    assert train.main(["--resume", str(run), "--num_epochs", "2", "--workers", "0"]) == 0
    assert ("CPU" in (run / "train.log").read_text()) == (device.type == "cpu")
    curves = scalars(run)
    assert sorted(curves["train/loss"]) == list(range(1, 21))
    assert all(np.isfinite(value) for value in curves["train/loss"].values())
    table = evaluated(run, scenes_path)
    best = max(curves["val/rsum"].values())
    assert 0 <= table["rsum"] <= 600
    again = evaluated(run, scenes_path, "--split", "dev", name="scenes_dev")
    assert again["rsum"] == pytest.approx(best, abs=0.01 if device.type == "cpu" else 40)


@LONG
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["laps", "seps", "hrem", "avse", "sgr"])
def test_mixed_precision_trains_and_evaluates(method, amp, device, scenes_path, tmp_path, capsys):
    run = tmp_path / "run"
    kernels._builds.cache_clear()  # it is asked under autocast here
    more = ["--method", method, "--amp", amp, "--warmup", "4", "--nhead", "4"]
    hard = ["--num_epochs", "1", "--max_violation"]
    assert train.main(flags(scenes_path, run, *more, *hard)) == 0
    saved = torch.load(run / "checkpoint_last.pth", weights_only=True)["training"]
    assert ("scale" in saved["scaler"]) == (amp == "fp16")
    assert saved["progress"]["learnt"] > 0
    assert 0 <= evaluated(run, scenes_path, "--amp", amp)["rsum"] <= 600
    assert "no fused scoring" not in capsys.readouterr().err


@QUICK
@pytest.mark.parametrize("scale", [2.0**127, 2.0 * LOWEST_LOSS_SCALE])
def test_an_overflow_of_fp16_costs_the_step_and_lowers_the_scale(scale, device):
    model = tiny_model("vse").to(device).train()
    optimizer = build_optimizer(model, 1e-3)
    update = Update(model, model, optimizer, device, autocast_for("fp16", device), "fp16")
    state = update.scaler.state_dict()
    update.scaler.load_state_dict({**state, "scale": scale})
    before = [one.detach().clone() for one in model.parameters()]
    inputs = {name: one.to(device) for name, one in pair_inputs(method="vse").items()}
    update._losses = lambda batch: model(**inputs)
    outcome = update.step([SimpleBatch()])
    moved = any(
        not torch.equal(one, old) for one, old in zip(model.parameters(), before, strict=True)
    )
    assert outcome.not_finite == []
    assert moved == outcome.learnt == (scale < 1)
    assert (update.scaler.get_scale() < scale) == (scale > 1)


class SimpleBatch:
    """Stands for a batch that a step only moves."""

    def to(self, device):
        return self


@LONG
def test_a_run_goes_on_with_the_noise_it_would_have_had(device, scenes_path, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ["--selection", "gumbel", "--lr_policy", "step", "--method", "seps"]
    assert train.main(flags(scenes_path, whole, *more)) == 0
    assert train.main(flags(scenes_path, halves, *more, "--num_epochs", "1")) == 0
    saved = torch.load(halves / "checkpoint_last.pth", weights_only=True)["training"]["rng"][0]
    assert (saved["cuda"] is None) == (device.type == "cpu")
    assert train.main(["--resume", str(halves), "--num_epochs", "2"]) == 0
    one, two = (scalars(run)["train/loss"] for run in (whole, halves))
    if device.type == "cpu":
        assert one == two
    else:  # sums over threads differ from run to run
        assert two[11] == pytest.approx(one[11], rel=2e-3)


@LONG
def test_frozen_features_are_cached(device, scenes_path, tmp_path, monkeypatch, capsys):
    run, cache = tmp_path / "run", ["--feature_cache", str(tmp_path / "cache")]
    argv = [*RUN, "--method", "laps", "--data_path", str(scenes_path), "--logger_name", str(run)]
    assert train.main([*argv, *cache]) == 0
    assert "80 to encode" in capsys.readouterr().out
    pixels = evaluated(run, scenes_path)
    cached = evaluated(run, scenes_path, *cache)
    monkeypatch.setattr("lib.model.encoders.image_tokens", None)  # the encoder may not run again
    assert evaluated(run, scenes_path, *cache)["rsum"] == cached["rsum"]
    assert cached["rsum"] == pytest.approx(pixels["rsum"], abs=40)  # of 16 images


# --- the fused scoring ---------------------------------------------------------------------------


def both_forms(call, monkeypatch) -> list[torch.Tensor]:
    """What a call returns with the fused scoring, which must have served, and without."""
    kernels._builds.cache_clear()  # what asks first may be under autocast
    served = []

    def watched(function):
        def watch(*arguments, **options):
            found = function(*arguments, **options)
            served.append(found is not None)
            return found

        return watch

    with monkeypatch.context() as patch:
        for module, name in (
            (kernels, "_tried"),
            (native, "matches"),
            (native_gradients, "matches"),
        ):
            patch.setattr(module, name, watched(getattr(module, name)))
        fused = call()
    assert served
    assert all(served)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "serves", lambda patches: False)
        return [fused, call()]


@QUICK
@pytest.mark.parametrize("patches", SIZES)
@pytest.mark.parametrize("method", ["laps", "seps", "seps_released"])
def test_fused_scores_are_the_plain_forms(method, patches, device, monkeypatch):
    case = Case(method, "eval", patches, None, 3, 20, device=str(device))
    model, images, texts = case.model(), case.image_tokens(), case.text_tokens()
    fused, plain = both_forms(call_of(case, "ours", model, images, texts), monkeypatch)
    assert fused.device.type == device.type
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)
    loop = call_of(case, "loop", case.model("loop"), images, texts)
    if method != "seps":
        torch.testing.assert_close(fused, loop(), atol=1e-5, rtol=0)


@QUICK
@pytest.mark.parametrize("patches", [196, 49])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_fused_scores_of_half_precision_features(amp, patches, device, monkeypatch):
    case = Case("laps", "eval", patches, None, 3, 12, device=str(device), amp=amp)
    call = call_of(case, "ours", case.model(), case.image_tokens(), case.text_tokens())
    fused, plain = both_forms(call, monkeypatch)
    torch.testing.assert_close(fused.float(), plain.float(), atol=2e-3, rtol=0)


@QUICK
@pytest.mark.parametrize("method", ["laps", "seps"])
def test_hardest_negatives_give_the_gradients_of_the_plain_form(method, device, monkeypatch):
    case = Case(method, "hardest", 196, None, 5, 5, device=str(device))
    model, images, texts = case.model(), case.image_tokens(), case.text_tokens()
    learn = call_of(case, "ours", model, images, texts)

    def gradients() -> list[torch.Tensor]:
        loss = learn()
        return [loss, images.local.grad.clone(), texts.local.grad.clone()]

    for fused, plain in zip(*both_forms(gradients, monkeypatch), strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


@QUICK
@torch.no_grad()
def test_a_program_that_can_not_be_built_is_told_once(device, monkeypatch, capsys):
    pytest.importorskip("triton")
    model = tiny_model("laps").to(device).eval()
    tokens = [one.to(device) for one in pair_inputs(4, "laps").values()]
    images, texts = encode(model, dict(zip(pair_inputs(4, "laps"), tokens, strict=True)))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "serves", lambda patches: False)
        wanted = model.similarity(images, texts)
    if device.type == "cpu":  # where Triton's interpreter would serve
        monkeypatch.setattr(compiled, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_interpreted", lambda: device.type == "cpu")
    monkeypatch.setattr(kernels, "_failed", set())
    for name in PROGRAMS:
        monkeypatch.setattr(kernels, name, Launched(broken=True))
    kernels._builds.cache_clear()
    try:
        for _ in range(2):
            torch.testing.assert_close(model.similarity(images, texts), wanted, atol=1e-5, rtol=0)
    finally:
        kernels._builds.cache_clear()
    told = capsys.readouterr().err
    assert told == "warning: no fused scoring, PyTorch does it (Failed to find C compiler.)\n"


NO_COMPILER = """
import sys, torch
from lib.model import kernels
from tools.benchmark.cases import Case, call_of
case = Case("laps", "eval", 49, None, 2, 3, device=sys.argv[1])
call = call_of(case, "ours", case.model(), case.image_tokens(), case.text_tokens())
assert call().isfinite().all()
print("fused", kernels.is_available(torch.zeros(1, device=sys.argv[1]).device))
"""


@LONG
def test_a_machine_without_a_compiler_scores(device, tmp_path):
    """Triton may bring a compiler of its own: what counts is that the scores come."""
    nowhere = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "PATH": "/nowhere"}
    caches = {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER, str(device)],
        cwd=ROOT,
        env={**os.environ, **nowhere, **caches},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fused ")
    if device.type == "cpu":
        assert done.stdout == "fused False\n"


# --- processes -----------------------------------------------------------------------------------


class Several(int):
    """A number of processes that is taken for several, though it is one."""

    __hash__ = int.__hash__

    def __eq__(self, other) -> bool:
        return False

    def __gt__(self, other) -> bool:
        return True


@pytest.fixture
def alone_in_a_group(device, monkeypatch):
    """One process in a group of NCCL, or on the CPU of gloo, that goes the way of several."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    found = distributed.start_processes(multi_gpu=True)
    assert found == device
    monkeypatch.setattr(distributed, "world_size", lambda: Several(1))
    yield device
    distributed.stop()


@QUICK
def test_one_process_gathers_what_it_sent(alone_in_a_group):
    device = alone_in_a_group
    assert torch.distributed.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
    tokens = random_tokens(3, 5, 4, seed=0, ragged=True, cls=True)
    local = tokens.local.detach().float().to(device).requires_grad_()
    tokens = replace(tokens, local=local, mask=tokens.mask.to(device), cls=None)
    gathered = distributed.gather_tokens(tokens)
    gathered.local.square().sum().backward()
    torch.testing.assert_close(local.grad, 2 * local.detach())
    assert gathered.mask.equal(tokens.mask)
    sent = replace(tokens, local=local.detach().bfloat16())
    taken = distributed.broadcast_tokens(sent, 0, device)
    assert taken.local.equal(sent.local)
    assert distributed.sum_over_ranks([2, 3], device) == [2, 3]
    rows = torch.rand(300, 7)  # on the CPU, as a matrix is that is larger than the device
    assert distributed.rows_on_main(rows, device).equal(rows)
    assert distributed.gather_values({"a": rows})[0]["a"].equal(rows)
    assert distributed.broadcast_value("x") == "x"
    assert distributed.on_main(lambda: 5) == 5
    distributed.barrier()


@QUICK
@pytest.mark.parametrize("hard", [False, True])
def test_one_process_learns_in_a_group_as_without(hard, alone_in_a_group):
    device = alone_in_a_group
    found = []
    for grouped in (False, True):
        model = tiny_model("seps").to(device).train()
        model.set_hard_negatives(hard)
        inputs = {name: one.to(device) for name, one in pair_inputs().items()}
        devices = [0] if device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=devices) if grouped else model
        loss = network(**inputs)["loss"]
        loss.backward()
        learnt = [one.grad for one in model.parameters() if one.grad is not None]
        assert len(learnt) > 20
        found.append([loss.detach(), *learnt])
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@LONG
def test_torchrun_with_one_process(device, scenes_path, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
    run = tmp_path / "run"
    argv = flags(scenes_path, run, "--num_epochs", "1", "--multi_gpu", "1", "--eval", "1")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    done = subprocess.run(
        [*launcher, "--standalone", "train.py", *argv],
        cwd=ROOT,
        env={**os.environ, **hidden, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (run / "results.json").exists()


# --- memory, and the benchmark -------------------------------------------------------------------


@LONG
@pytest.mark.parametrize(("mode", "share"), [("hardest", 1 / 9), ("sum", 1 / 4)])
def test_a_batch_needs_a_share_of_the_official_ways_memory(mode, share, device):
    """At B = 64 on a GPU; a CPU shows it with a smaller batch, and less of it."""
    on_gpu = device.type == "cuda"
    batch = 64 if on_gpu else 24
    case = Case("laps", mode, 196, None, batch, batch, device=str(device))
    ours, loop = (peak_memory(case, way, batch, device) for way in ("ours", "loop"))
    assert ours <= (share if on_gpu else 1 / 2) * loop
    if on_gpu:
        half = replace(case, amp="bf16")
        assert peak_memory(half, "ours", batch, device) <= 8e9


@LONG
def test_the_whole_benchmark_in_small(device, tmp_path, capsys):
    path = tmp_path / "rows.json"
    asked = ["--device", device.type, "--sizes", "small", "--repeats", "1", "--json", str(path)]
    assert benchmark(["all", *asked, "--budget", "200"]) == 0
    found = json.loads(path.read_text())
    assert [row for row in found["rows"] if row.get("failed") or row.get("left_out")] == []
    names = {row["name"] for row in found["rows"]}
    for precision in ("float32", "bf16", "fp16"):
        assert f"seps_released sum 9 patches real 4x4 {precision}" in names
    told = capsys.readouterr().out
    assert "| laps eval 9 patches real 4x6 float32 |" in told
    assert {"versions", "machine", "date", "command"} <= set(found)
    assert ("driver" in found) == (device.type == "cuda")
