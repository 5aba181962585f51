"""Commands under a lock: logs, exit codes, and a child that saves before it ends."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from lib.retrieval import commands
from lib.retrieval.comparison import last_line

CHILD = (
    "import signal, sys, time\n"
    "def save(*_): print('saved'); sys.exit(130)\n"
    "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
)


def test_a_command_runs_into_its_log(tmp_path):
    log = tmp_path / "output.log"
    with commands.locked(tmp_path) as lock:
        code = commands.executor(lock, threading.Event(), {"TOLD": "said"})(
            [sys.executable, "-c", "import os; print(os.environ['TOLD']); raise SystemExit(7)"],
            log,
            lambda: None,
        )
    assert code == 7
    assert last_line(log) == "said"


def test_an_interrupt_lets_the_child_save_first(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "TICK_SECONDS", 1)
    log = tmp_path / "output.log"

    def tick() -> None:
        if last_line(log) == "ready":
            raise KeyboardInterrupt

    with commands.locked(tmp_path) as lock, pytest.raises(KeyboardInterrupt):
        commands.executor(lock, threading.Event())([sys.executable, "-c", CHILD], log, tick)
    assert last_line(log) == "saved"


def test_another_thread_stops_the_child_which_saves_first(tmp_path):
    log, stopped = tmp_path / "output.log", threading.Event()

    def stop() -> None:
        while not log.exists() or last_line(log) != "ready":
            time.sleep(0.05)
        stopped.set()

    threading.Thread(target=stop, daemon=True).start()
    with commands.locked(tmp_path) as lock, pytest.raises(KeyboardInterrupt):
        commands.executor(lock, stopped)([sys.executable, "-c", CHILD], log, lambda: None)
    assert last_line(log) == "saved"
