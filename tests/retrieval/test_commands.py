"""Commands under a lock: logs, exit codes, and a child that saves before it ends."""

from __future__ import annotations

import sys

import pytest

from lib.retrieval import commands
from lib.retrieval.comparison import last_line


def test_a_command_runs_into_its_log(tmp_path):
    log = tmp_path / "output.log"
    with commands.locked(tmp_path) as lock:
        code = commands.executor(lock)(
            [sys.executable, "-c", "print('said'); raise SystemExit(7)"], log, lambda: None
        )
    assert code == 7
    assert last_line(log) == "said"


def test_an_interrupt_lets_the_child_save_first(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "TICK_SECONDS", 0.05)
    log = tmp_path / "output.log"
    child = (
        "import signal, sys, time\n"
        "def save(*_): print('saved'); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )

    def tick() -> None:
        if last_line(log) == "ready":
            raise KeyboardInterrupt

    with commands.locked(tmp_path) as lock, pytest.raises(KeyboardInterrupt):
        commands.executor(lock)([sys.executable, "-c", child], log, tick)
    assert last_line(log) == "saved"
