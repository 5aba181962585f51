"""What is settled before the first step."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings

import pytest
import torch

from lib.errors import InputWarning
from lib.training.setup import set_encoders_up
from tests.helpers import pair_inputs, tiny_model

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


DETACHED = {"image_cls": 0, "detach_patches": 1}


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


@pytest.mark.parametrize(
    ("method", "flags", "learns"),
    [
        ("seps_released", {"image_cls": 0}, False),
        ("seps", DETACHED, False),
        ("seps_released", {"image_cls": 1}, True),
        ("seps_released", {"image_cls": 0, "detach_patches": 0}, True),
        ("seps_released", {"image_cls": 0, "global_weight": 1.0}, True),
        ("seps", {**DETACHED, "dense_match": "max_mean"}, False),
        ("seps", {**DETACHED, "dense_match": "max_mean", "match_gate": "image"}, True),
        ("vse", {"image_cls": 0}, True),
    ],
)
def test_an_image_encoder_that_nothing_trains_is_told(method, flags, learns):
    model = tiny_model(method, **flags)
    if "match_gate" in flags:
        torch.nn.init.ones_(model.dense_match.gate.weight)  # as after a step: it starts at 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        set_encoders_up(model, 0, False)
    sentences = [str(one.message) for one in told if one.category is InputWarning]
    assert len(sentences) == (0 if learns else 1)
    assert all(f"nothing trains the image encoder: {method} " in one for one in sentences)
    model.training_losses(**pair_inputs(4, method, **flags))["loss"].backward()
    weights = list(model.image_encoder.parameters())
    assert any(one.grad is not None and one.grad.any() for one in weights) == learns
