"""What a run folder records, and that no character and no full disk ends a run through it."""

from __future__ import annotations

import errno
import io
from pathlib import Path

from lib.training import logs
from lib.training.logs import RunLog, entries_apart, printable


class Curves:
    """In the place of TensorBoard."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.points += [(name, value, step) for name, value in values.items()]

    def close(self) -> None:
        pass


def a_log(folder: Path) -> RunLog:
    log = RunLog(folder)
    log.trackers = [Curves()]
    return log


def test_a_curve_that_never_changes_is_not_drawn(tmp_path):
    log = a_log(tmp_path)
    for step in (1, 2, 3):
        log.changing_scalars({"train/ratio": 0.25, "train/kept": 0.5 + 1e-8 * step}, step)
    assert log.trackers[0].points == []


def test_a_curve_that_changes_is_drawn_from_its_beginning(tmp_path):
    log = a_log(tmp_path)
    for step, value in enumerate([0.5, 0.5, 0.5, 0.4, 0.4, 0.5], start=1):
        log.changing_scalars({"kept": value}, step)
    assert [(value, step) for _, value, step in log.trackers[0].points] == [
        (0.5, 1),
        (0.5, 3),
        (0.4, 4),
        (0.4, 5),
        (0.5, 6),
    ]


def test_short_runs_show_a_curve_and_long_ones_stay_small():
    assert [entries_apart(steps) for steps in (1, 20, 1560, 20_000, 130_000)] == [
        1,
        1,
        15,
        200,
        200,
    ]


def test_a_character_that_the_terminal_lacks_is_escaped(tmp_path, monkeypatch):
    ascii_terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(logs.sys, "stdout", ascii_terminal)
    log = RunLog(tmp_path)
    log.say("Bär \udcff.jpg can't be decoded")
    log.close()
    ascii_terminal.flush()
    assert ascii_terminal.buffer.getvalue() == b"B\\xe4r \\udcff.jpg can't be decoded\n"
    assert "Bär \\udcff.jpg" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert printable("Bär", io.StringIO()) == "Bär"


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logs, "append_text", full)
    log = RunLog(tmp_path)
    log.open_curves(0)
    for _ in range(3):
        log.say("step")
    log.close()
    told = capsys.readouterr()
    assert told.out == "step\n" * 3
    assert told.err.count("No space left on device") == 1


def test_a_run_that_fails_to_begin_appends_only_at_the_end(tmp_path):
    log = RunLog(tmp_path)
    log.say("seps on f30k")
    assert not (tmp_path / "train.log").exists()
    log.open_curves(0)
    log.say("step 1")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["seps on f30k", "step 1"]
    log.close()
    failed = RunLog(tmp_path)
    failed.say("laps on f30k")
    failed.say("stopped: no folder", only_in_file=True)
    failed.close()
    assert (tmp_path / "train.log").read_text().endswith("stopped: no folder\n")
