"""Two nodes: what they must share, what is told where they don't; they train like one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import train
from lib import distributed
from lib.data.features import FeatureCache, fill_share
from lib.data.fingerprint import check_same_files
from lib.errors import InputError, WorkerError
from lib.training import restart
from lib.training.folder import check_folder, claimed
from tests.test_train import ROOT, flags, scalars
from tests.training.test_distributed import free_port
from tests.training.test_restart import wait_for, worker

DATA = {"dataset": "f30k", "split": "train", "images": 3, "captions": 9, "captions_sha256": "a"}


def told(work) -> str:
    """The sentence of an InputError, "" where there is none."""
    try:
        work()
    except (InputError, WorkerError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def claim(*how) -> None:
    with claimed("run", *how):
        pass


def be_a_node(rank: int, port: int, root: str, results) -> None:
    """A process on a machine of its own: another name, and a disk that the other does not see."""
    torch.set_num_threads(1)
    socket.gethostname = lambda: f"node{rank}"
    os.chdir(Path(root) / f"disk{rank}")
    Path("run").mkdir()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.LATE_SECONDS = 0.3
    distributed.start("gloo", seconds=120)
    shared = Path(root) / "shared"
    found = {
        "shared": distributed.hosts_without(shared),
        "own": distributed.hosts_without("run"),
        "left": sorted(path.name for path in [*shared.iterdir(), *Path("run").iterdir()]),
        "new": told(lambda: claim(None, False)),
        "read": told(lambda: claim(None, True)),
        "restart": told(lambda: claim("run" if rank == 0 else None, False)),
        "data": told(lambda: check_same_files({**DATA, "captions_sha256": "ab"[rank]})),
        "same": told(lambda: check_same_files(DATA)),
        "cache": told(lambda: fill_share(FeatureCache("cache", "e", 2, 2), [], None, (8, 8))),
        "drawn": told(lambda: distributed.once_a_host(lambda: Path("drawn").touch())),
        "there": Path("drawn").exists(),
        "error": told(lambda: distributed.agree(InputError("no file a") if rank else None)),
        "worker": told(lambda: distributed.agree(WorkerError("killed") if rank else None)),
    }
    results[rank] = found
    distributed.stop()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    root = tmp_path_factory.mktemp("nodes")
    for name in ("disk0", "disk1", "shared"):
        (root / name).mkdir()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(be_a_node, (free_port(), str(root), results), nprocs=2)
        return dict(results)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_a_node_does_not_see_is_told(nodes, rank):
    found = nodes[rank]
    assert (found["shared"], found["own"]) == ([], ["node1"])
    assert found["left"] == []
    assert found["new"] == ""  # a new run writes on rank 0 alone: a warning
    for case in ("read", "restart"):  # of a restart one rank alone may have found a checkpoint
        assert "run: node1 does not see what rank 0 writes there; put the run" in found[case]
    assert "--feature_cache" in found["cache"]
    assert "node1 does not see" in found["cache"]


@pytest.mark.parametrize("rank", [0, 1])
def test_other_data_on_a_node_is_told(nodes, rank):
    assert nodes[rank]["same"] == ""
    assert nodes[rank]["data"] == (
        "InputError: rank 1 on node1 reads other data than rank 0 on node0: "
        "the captions' words or order; give every node the same files"
    )


def test_scenes_are_drawn_once_on_each_node(nodes):
    assert [nodes[rank]["there"] for rank in (0, 1)] == [True, True]


def test_an_error_says_on_which_node_it_was(nodes):
    assert nodes[0]["error"] == "InputError: rank 1 on node1: no file a"
    assert nodes[1]["error"] == "InputError: no file a"
    assert nodes[0]["worker"] == "WorkerError: rank 1 on node1: killed"


def test_a_node_that_does_not_see_the_resumed_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=f"on {socket.gethostname()}, and all nodes must see"):
        check_folder(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("count", "others", "local", "restarted"),
    [
        ("0", [False, False], "2", False),
        ("0", [False, True], "2", True),  # another node's worker failed
        ("1", [True, False], "2", True),
        ("1", None, "4", True),  # one node: nobody is asked
        ("0", None, "4", False),
    ],
)
def test_a_restart_is_every_nodes(monkeypatch, count, others, local, restarted):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    met = []
    monkeypatch.setattr(restart, "start_processes", lambda **how: met.append(how))
    monkeypatch.setattr(restart, "gather_values", lambda mine: others)
    assert restart.was_restarted({"multi_gpu": True}) is restarted
    assert bool(met) == (others is not None)


def agent(number: int, port: int, argv: list[str], log: Path, *more: str) -> subprocess.Popen:
    """torchrun's agent of one of two nodes with two processes each."""
    launch = "-m torch.distributed.run --nnodes 2 --nproc_per_node 2 --rdzv_backend c10d".split()
    launch += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "two"]
    launch += ["--node_rank", str(number), "--local_addr", f"127.0.0.{number + 1}"]
    with open(log, "w") as output:
        return subprocess.Popen(
            [sys.executable, *launch, *more, "train.py", "--multi_gpu", "1", *argv],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_a_worker_killed_on_one_node_restarts_both(scenes_path, tmp_path):
    """The node whose workers were well is told of no restart by torchrun, and goes on too."""
    folder, port = tmp_path / "run", free_port()
    extra = ["--batch_size", "4", "--num_epochs", "5000", "--save_step", "5"]
    argv = flags(scenes_path, folder, *extra, "--val_step", "100000")
    logs = [tmp_path / f"output{number}" for number in (0, 1)]
    both = [agent(number, port, argv, logs[number], "--max_restarts=1") for number in (0, 1)]
    try:
        wait_for((folder / "checkpoint_last.pth").exists, both[0], logs[0])
        pid = next(filter(None, (worker(both[1].pid, rank) for rank in range(4))))
        os.kill(pid, signal.SIGKILL)
        records = folder / "train.log"
        wait_for(lambda: "going on at step" in records.read_text(), both[0], logs[0])
        gone_on = records.read_text().count("\n")
        wait_for(lambda: records.read_text().count("\n") > gone_on + 3, both[0], logs[0])
        for process in both:
            process.terminate()
        for process in both:
            process.wait(120)
    finally:
        for process in both:
            process.kill()
    said = "".join(log.read_text() for log in logs)
    assert "already holds a run" not in said
    assert records.read_text().count("going on at step") == 1


@pytest.mark.slow
def test_two_nodes_train_like_one_process(scenes_path, tmp_path):
    """The same losses, and weights as far as float32's rounding lets five steps agree."""
    extra = ["--num_epochs", "1", "--val_step", "5", "--eval", "1"]
    port = free_port()
    argv = flags(scenes_path, tmp_path / "four", *extra, "--batch_size", "4", "--workers", "1")
    logs = [tmp_path / f"output{number}" for number in (0, 1)]
    both = [agent(number, port, argv, logs[number]) for number in (0, 1)]
    codes = [process.wait(timeout=280) for process in both]
    outputs = [log.read_text() for log in logs]
    assert codes == [0, 0], outputs
    assert sum("4 processes on CPU" in output for output in outputs) == 1, outputs
    assert sum("rSum\n" in output for output in outputs) == 1, outputs  # one table
    assert train.main(flags(scenes_path, tmp_path / "one", *extra)) == 0
    one, four = scalars(tmp_path / "one"), scalars(tmp_path / "four")
    assert one["train/loss"].keys() == four["train/loss"].keys()
    steps = range(1, 6)
    losses = [[curves["train/loss"][step] for step in steps] for curves in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    ends = [
        torch.load(tmp_path / name / "checkpoint_last.pth", weights_only=True)
        for name in ("one", "four")
    ]
    for name, value in ends[0]["model"].items():
        torch.testing.assert_close(ends[1]["model"][name], value, atol=2e-3, rtol=1e-2, msg=name)
    assert len(list((tmp_path / "four").glob("events*"))) == 1  # rank 0 alone writes
