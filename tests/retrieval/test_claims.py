"""Work shared out by files: nobody does the same, nobody's death stops the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.retrieval import claims
from lib.retrieval.claims import CLAIM, RESULT, holders, share_out, wait_for_group

NAMES = [f"{number:03d}" for number in range(12)]


def worker(folder: Path, done: list[str], **how) -> threading.Thread:
    def work(name: str) -> None:
        time.sleep(0.01)
        done.append(name)
        (folder / (name + RESULT)).write_text(name)

    thread = threading.Thread(target=share_out, args=(folder, NAMES, work), kwargs=how)
    thread.start()
    return thread


def claim(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / (name + CLAIM)
    path.write_text(text)
    return path


def test_several_workers_do_each_item_once(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    shares: list[list[str]] = [[], [], []]
    threads = [worker(tmp_path, share) for share in shares]
    for thread in threads:
        thread.join()
    assert sorted(name for share in shares for name in share) == NAMES
    assert all(shares)
    assert {path.suffix for path in tmp_path.iterdir()} == {RESULT}


def test_what_is_there_is_not_done_again(tmp_path):
    for name in NAMES[:9]:
        (tmp_path / (name + RESULT)).write_text("there")
    done, told = [], []
    worker(tmp_path, done, listed=told.append).join()
    assert done == NAMES[9:]
    assert told == [9, 10, 11, 12]


def test_without_wait_another_process_is_left_at_its_work(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        path = claim(tmp_path, "005", f"{socket.gethostname()} {other.pid} g\n")
        done: list[str] = []
        thread = worker(tmp_path, done, wait=False)
        time.sleep(1)
        assert thread.is_alive()  # until the claim is touched
        os.utime(path)
        thread.join(20)
        assert not thread.is_alive()
        assert done == [name for name in NAMES if name != "005"]
        assert str(other.pid) in holders(tmp_path)
    finally:
        other.communicate(b"\n")
    worker(tmp_path, done, wait=False).join()  # it is gone without having given its claim back
    assert sorted(done) == NAMES


def test_without_wait_what_a_machine_that_was_just_killed_held_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(claims, "STALE_SECONDS", 2.0)
    for name in ("004", "005"):
        claim(tmp_path, name, "another-machine 1 g\n")
    done: list[str] = []
    worker(tmp_path, done, wait=False).join(20)
    assert sorted(done) == NAMES


def test_a_claim_of_another_machine_that_nobody_touches_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    path = claim(tmp_path, "000", "another-machine 1 g\n")
    done: list[str] = []
    thread = worker(tmp_path, done)
    time.sleep(0.5)
    assert thread.is_alive()  # waits for the one that is under way
    assert "process 1 on another-machine" in capsys.readouterr().err
    long_ago = time.time() - claims.STALE_SECONDS - 60
    os.utime(path, (long_ago, long_ago))
    thread.join(20)
    assert sorted(done) == NAMES


def test_a_claim_is_touched_while_the_work_lasts_and_given_back_after_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    seen = []

    def work(name: str) -> None:
        path = tmp_path / (name + CLAIM)
        os.utime(path, (0, 0))
        time.sleep(0.2)
        seen.append(path.stat().st_mtime)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        share_out(tmp_path, NAMES, work)
    assert seen[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_processes_started_together_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    claim(tmp_path, "000", "another-machine 1 theirs\n")
    path = claim(tmp_path, "001", "another-machine 2 ours\n")
    thread = threading.Thread(target=wait_for_group, args=(tmp_path, "ours"))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    path.unlink()
    thread.join(5)
    assert not thread.is_alive()
