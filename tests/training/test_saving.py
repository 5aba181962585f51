"""Checkpoints are written from a snapshot, one after the other, and what fails is told."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lib.training import saving
from lib.training.saving import CheckpointWriter, snapshot


def test_a_snapshot_shares_no_memory():
    tensor = torch.zeros(3)
    taken = snapshot({"a": [tensor, 1], "b": {"c": (tensor, "x")}})
    tensor.fill_(7)
    assert taken["a"][0].tolist() == taken["b"]["c"][0].tolist() == [0, 0, 0]
    assert taken["a"][1] == 1
    assert taken["b"]["c"][1] == "x"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    write = saving.save_payload

    def slow(path, payload):
        begun.set()
        assert may_end.wait(20)
        write(path, payload)

    monkeypatch.setattr(saving, "save_payload", slow)
    writer, weights = CheckpointWriter(tmp_path), torch.zeros(2)
    writer.save("last.pth", lambda: {"weights": weights})
    assert begun.wait(20)
    weights.fill_(1)  # the next step
    may_end.set()
    writer.finish()
    assert torch.load(tmp_path / "last.pth")["weights"].tolist() == [0, 0]


def test_checkpoints_come_in_order(tmp_path, monkeypatch):
    write = saving.save_payload

    def slow_first(path, payload):
        time.sleep(0.3 if payload["step"] == 1 else 0)
        write(path, payload)

    monkeypatch.setattr(saving, "save_payload", slow_first)
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2):
        writer.save("last.pth", lambda: {"step": step})  # noqa: B023
    writer.finish()
    assert torch.load(tmp_path / "last.pth")["step"] == 2


def test_what_can_not_be_written_is_raised_where_it_is_waited_for(tmp_path):
    (tmp_path / "file").touch()
    writer = CheckpointWriter(tmp_path / "file")
    writer.save("last.pth", lambda: {"step": 1})
    for _ in range(2):
        with pytest.raises(OSError):
            writer.finish()
    assert writer.error is not None
