"""A run folder belongs to one run at a time, and a run goes on only as what it was."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.training.folder import (
    LOCK,
    check_folder,
    check_same_folder,
    check_same_run,
    claimed,
    clear_run,
)

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, ready) -> None:
    with claimed(folder):
        ready.set()
        time.sleep(60)


def test_a_second_run_is_refused_until_the_first_ends_or_crashes(tmp_path):
    folder, ready = tmp_path / "run", FORK.Event()
    first = FORK.Process(target=hold, args=(folder, ready))
    first.start()
    assert ready.wait(20)
    with pytest.raises(InputError, match=rf"in use by another run \(process {first.pid} on "):
        claimed(folder).__enter__()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with claimed(folder):
        pass
    with claimed(folder):
        assert str(os.getpid()) in (folder / LOCK).read_text()


def test_a_child_of_the_run_does_not_hold_the_folder_on(tmp_path):
    """Loader workers may outlive a killed run by seconds."""
    with claimed(tmp_path):
        child = FORK.Process(target=time.sleep, args=(30,))
        child.start()
    other = FORK.Process(target=hold, args=(tmp_path, ready := FORK.Event()))
    other.start()
    assert ready.wait(20)
    for process in (child, other):
        process.kill()
        process.join()


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file of that name"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="can't be written"), claimed(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(
    ("there", "resume", "told"),
    [
        (["model_best.pth"], False, "already holds a run"),
        (["checkpoint_last.pth"], False, "--overwrite 1"),
        ([], True, "no args.json"),
        (["args.json", "model_best.pth"], True, "no checkpoint_last.pth to go on from"),
        (["args.json"], True, "ended before its first checkpoint"),
    ],
)
def test_a_folder_that_does_not_fit(tmp_path, there, resume, told):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=told):
        check_folder(tmp_path, resume)


def test_folders_that_fit(tmp_path):
    check_folder(tmp_path / "new")
    for name in ("args.json", "checkpoint_last.pth"):
        (tmp_path / name).touch()
    check_folder(tmp_path, resume=True)
    check_folder(tmp_path, overwrite=True)


def test_clearing_leaves_what_is_not_the_runs(tmp_path):
    for name in ("model_best.pth", "events.out.1", "train.log", "notes.txt"):
        (tmp_path / name).touch()
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_goes_on_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_same_folder("runs/a", None)
    check_same_folder("runs/a", str(tmp_path / "runs" / "a") + "/")
    with pytest.raises(InputError, match="leave --logger_name out"):
        check_same_folder("runs/a", "runs/b")


def test_another_method_seed_or_data_is_named():
    state = {"method": "laps", "args": {"seed": 1}}
    check_same_run("runs/a", state, "laps", 1, [])
    with pytest.raises(InputError) as caught:
        check_same_run("runs/a", state, "seps", 0, ["30 captions (was 60)"])
    for told in ("30 captions (was 60)", "method seps (was laps)", "seed 0 (was 1)"):
        assert told in str(caught.value)
