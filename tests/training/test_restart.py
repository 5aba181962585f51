"""torchrun's restart of killed workers: the run goes on by itself, every time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    "--tiny_layers 1 --batch_size 8 --workers 0 --num_epochs 5000 --save_step 5 --val_step 100000 "
    "--multi_gpu 1"
)


def worker(parent: int, rank: int) -> int | None:
    """Process id of one rank below torchrun, None while it is not there."""
    for folder in Path("/proc").iterdir():
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if int(status[1]) == parent and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    return None


def wait_for(what: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while not what():
        said = log.read_text()[-3000:]
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_a_worker_killed_three_times_costs_nothing_but_time(scenes_path, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "output"
    flags = [*SMALL.split(), "--data_path", str(scenes_path), "--logger_name", str(folder)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*launcher, "--max_restarts=3", "train.py", *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    records, last = folder / "train.log", folder / "checkpoint_last.pth"

    def said() -> str:
        return records.read_text() if records.exists() else ""

    def step() -> int:
        return torch.load(last, weights_only=True)["training"]["progress"]["step"]

    try:
        wait_for(last.exists, process, log)
        for restart, rank in enumerate((1, 0, 1), start=1):
            before = step()
            pid = worker(process.pid, rank)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: said().count("going on at step") >= restart, process, log)  # noqa: B023
            wait_for(lambda: step() > before, process, log)  # noqa: B023
        process.terminate()
        process.wait(120)
    finally:
        process.kill()
    assert said().count("going on at step") == 3, log.read_text()[-3000:]
    assert "stopped and saved" in said()
    assert "could not meet" not in log.read_text()
