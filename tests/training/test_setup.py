"""What is settled before the first step."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from lib.training.setup import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(20):
        torch.empty(1 << 24).fill_(1.0)  # 64 MiB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_mallopt() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "mallopt")
    except (OSError, TypeError):
        return False


@pytest.mark.skipif(not has_mallopt(), reason="another C library than glibc")
def test_freed_memory_is_taken_again():
    faults = {
        kind: int(subprocess.check_output([sys.executable, "-c", FAULTS, kind], text=True))
        for kind in ("keep", "give back")
    }
    assert faults["give back"] > 20  # so that the test says something: pages come anew
    assert faults["keep"] < faults["give back"] / 10


def test_another_c_library_is_left_alone(monkeypatch):
    from lib.training import setup

    monkeypatch.setattr(setup.ctypes, "CDLL", lambda name: object())
    setup.keep_freed_memory()
