"""The Slurm scripts run against stand-ins of Slurm: what they start parses, flag by flag."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from arguments import parse_eval, parse_train
from tools.search import parser as search_parser

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "16",
}
# the words after the stand-in's name, of srun those after its own flags
STAND_IN = f"""#!{sys.executable}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


@pytest.fixture
def run(tmp_path):
    """Run a script where Slurm's programs and Python only tell how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "python"):
        (programs / name).write_text(STAND_IN)
    (programs / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    for path in programs.iterdir():
        path.chmod(0o755)

    def words(script: str, *more: str, **variables: str) -> list[str]:
        done = subprocess.run(
            ["bash", str(ROOT / "recipes" / "slurm" / script), *more],
            env={
                **SLURM,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHON": str(programs / "python"),
                "SLURM_SUBMIT_DIR": str(ROOT),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return words


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_bash_with_its_settings_on_top(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "set -euo pipefail" in lines
    settings = [line for line in lines if line.startswith("#SBATCH ")]
    # Slurm reads no further than the first command, and takes no comment behind a setting
    assert lines.index(settings[-1]) < lines.index("set -euo pipefail")
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in settings)


def of_train(words: list[str]) -> tuple[list[str], list[str]]:
    """torchrun's and train.py's own words of an srun command."""
    place = words.index("train.py")
    assert words[:1] == ["--kill-on-bad-exit=1"]
    assert words[2:4] == ["-m", "torch.distributed.run"]
    return words[4 : place + 1], words[place + 1 :]


def test_a_training_begins(run, tmp_path):
    folder = str(tmp_path / "run")
    launch, flags = of_train(run("train.sbatch", "--batch_size", "32", RUN=folder))
    asked = parse_torchrun(launch)
    assert (asked.nnodes, asked.nproc_per_node) == ("2", "4")
    assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", "node1:24711")
    args = parse_train(flags)
    assert (args.method, args.dataset, args.batch_size) == ("seps", "f30k", 32)
    assert (args.multi_gpu, args.logger_name, args.dist_timeout) == (1, folder, 1800)


def test_a_training_goes_on(run, tmp_path):
    (tmp_path / "checkpoint_last.pth").touch()
    _, flags = of_train(run("train.sbatch", RUN=str(tmp_path)))
    args = parse_train(flags)
    assert (args.resume, args.multi_gpu) == (str(tmp_path), 1)
    assert "--config" not in flags


def test_an_evaluation_is_shared_by_the_tasks(run):
    words = run("evaluate.sbatch", "--split", "dev", RUN="runs/x", BLOCK="4096")
    assert words[0] == "eval.py"
    args = parse_eval(words[1:])
    assert (args.checkpoint, args.shards) == ("runs/x/model_best.pth", "runs/x/shards")
    assert (args.shard_images, args.split) == (4096, "dev")


def test_a_folder_is_encoded_and_merged(run):
    words = run("index.sbatch", "--store", "int8", PICTURES="photos", INDEX="i")
    args = search_parser().parse_args(words[2:])
    assert (words[:2], args.command, args.folder, args.out) == (
        ["-m", "tools.search"],
        "index",
        "photos",
        "i",
    )
    assert args.store == "int8"
    words = run("index.sbatch", "merge", "--faiss", "flat", INDEX="i")
    args = search_parser().parse_args(words[2:])
    assert (args.command, args.indices, args.faiss) == ("merge", ["i"], "flat")


def test_the_readmes_two_nodes_parse():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("### Several machines")[1].split("\n[docs/results.md]")[0]
    lines = [line for line in section.splitlines() if "torch.distributed.run" in line]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)[3:]
        place = words.index("train.py")
        assert parse_torchrun(words[: place + 1]).nnodes == "2"
        assert parse_train(words[place + 1 :]).multi_gpu == 1
