"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest
import torch

from lib.training.optim import (
    build_optimizer,
    cosine_decay,
    parameter_groups,
    set_learning_rate,
    step_decay,
    with_warmup,
)
from lib.training.progress import restore_optimizer
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


def test_on_the_cpu_one_pass_updates_the_weights_as_many_do():
    models = [tiny_model(embed_size=16) for _ in range(2)]
    fused = build_optimizer(models[0], learning_rate=1e-2)
    assert fused.param_groups[0]["fused"]
    plain = torch.optim.AdamW(parameter_groups(models[1], 1e-2, 0.1, 1e-4), betas=(0.9, 0.999))
    for step in range(3):
        for model, optimizer in zip(models, (fused, plain), strict=True):
            generator = torch.Generator().manual_seed(step)
            for one in model.parameters():
                one.grad = torch.randn(one.shape, generator=generator)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_what_another_device_saved_goes_on_under_a_loss_scale(fused):
    """A run of CUDA, or of before AdamW was fused on the CPU: GradScaler asks how it was made."""
    before, model = tiny_model(embed_size=16), tiny_model(embed_size=16)
    saved = torch.optim.AdamW(parameter_groups(before, 1e-2, 0.1, 1e-4), fused=fused)
    for group in saved.param_groups:
        group["base_lr"] = group["lr"]
    optimizer, scaler = build_optimizer(model, 1e-2), torch.amp.GradScaler("cpu")
    for one in before.parameters():
        one.grad = torch.ones_like(one)
    saved.step()
    restore_optimizer({"optimizer": saved.state_dict(), "scaler": {}}, optimizer, scaler)
    scaler.scale(sum(one.sum() for one in model.parameters())).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert {int(one["step"]) for one in optimizer.state.values()} == {2}
