"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest

from lib.training.optim import (
    build_optimizer,
    cosine_decay,
    set_learning_rate,
    step_decay,
    with_warmup,
)
from tests.helpers import tiny_model


def test_backbones_learn_at_a_tenth():
    model = tiny_model(embed_size=16)
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_ratio=0.1, beta2=0.98)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"backbones": pytest.approx(1e-4), "heads": pytest.approx(1e-3)}
    heads = next(g for g in optimizer.param_groups if g["name"] == "heads")["params"]
    assert any(p is model.image_encoder.proj.weight for p in heads)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-5, 5e-4}


def test_step_decay_falls_as_epochs_begin():
    factor = step_decay(10, [2, 4], 0.3)
    assert [factor(step) for step in (0, 19, 20, 39, 40)] == pytest.approx([1, 1, 0.3, 0.3, 0.09])


def test_cosine_and_warmup():
    factor = with_warmup(cosine_decay(100), 10)
    assert factor(0) == pytest.approx(0.1)
    assert factor(50) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    assert factor(10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))


def test_each_backbone_may_have_its_own_rate():
    model = tiny_model("laps")
    groups = {g["name"]: g for g in build_optimizer(model, 1e-3, (0.1, 0.02)).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "backbones": 1e-4,
        "text backbone": 2e-5,
        "heads": 1e-3,
    }
    own = {id(p) for p in model.text_encoder.backbone.parameters()}
    assert {id(p) for p in groups["text backbone"]["params"]} == own
    assert len(build_optimizer(model, 1e-3, (0.1, 0.1)).param_groups) == 2
