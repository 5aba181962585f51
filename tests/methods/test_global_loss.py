"""--global_weight: a loss of its own on global embeddings, beside whatever method trains."""

from __future__ import annotations

import pytest
import torch

from lib.errors import InputError
from lib.methods.registry import get_method, method_names
from tests.helpers import encode, pair_inputs, tiny_model

ABLE = [name for name in method_names() if get_method(name).has_global_embedding]


def naive_hinge(similarity, image_ids, margin=0.2, hard=False):
    total = 0.0
    for matrix in (similarity, similarity.T):
        for i in range(len(matrix)):
            costs = [
                max(0.0, float(margin + matrix[i, j] - matrix[i, i]))
                for j in range(len(matrix))
                if image_ids[i] != image_ids[j]
            ]
            total += max(costs) if hard else sum(costs)
    return total


def naive_mean(tokens):
    rows = [
        features[mask].mean(0) for features, mask in zip(tokens.local, tokens.mask, strict=True)
    ]
    return torch.stack([row / row.norm() for row in rows])


def losses_of(model, inputs):
    torch.manual_seed(0)
    return model.training_losses(**inputs)


@pytest.mark.parametrize("method", ABLE)
def test_it_is_added_to_the_loss_of_every_method(method):
    inputs = pair_inputs(method=method)
    plain = losses_of(tiny_model(method).train(), inputs)
    both = losses_of(tiny_model(method, global_weight=0.5).train(), inputs)
    assert "global" not in plain
    assert both["global"] > 0
    torch.testing.assert_close(both["loss"], plain["loss"] + both["global"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hard", [False, True])
def test_against_a_naive_loop(hard):
    inputs = pair_inputs(method="laps")
    model = tiny_model("laps", global_weight=0.5).eval()
    model.set_hard_negatives(hard)
    with torch.no_grad():
        images, texts = encode(model, inputs)
        found = losses_of(model, inputs)["global"]
    cosines = naive_mean(images) @ naive_mean(texts).T
    expected = 0.5 * naive_hinge(cosines, inputs["image_ids"], hard=hard)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_infonce_has_a_temperature_of_its_own():
    model = tiny_model("laps", global_weight=0.5, global_loss="infonce").train()
    losses = losses_of(model, pair_inputs(method="laps"))
    losses["loss"].backward()
    assert model.global_loss.criterion.log_scale.grad.abs() > 0
    assert model.criterion.loss == "vse"


def test_its_gradient_reaches_both_encoders():
    model = tiny_model("laps", global_weight=0.5).train()
    images, texts = encode(model, pair_inputs(method="laps"))
    embeddings = model.global_embeddings(images), model.global_embeddings(texts)
    model.global_loss(*embeddings, torch.arange(6)).backward()
    for encoder in (model.image_encoder, model.text_encoder):
        assert any(
            p.grad is not None and bool(p.grad.abs().sum() > 0) for p in encoder.parameters()
        )


def test_the_embedding_warm_up_leaves_it_alone():
    inputs = pair_inputs(method="laps")
    model = tiny_model("laps", global_weight=0.5).eval()
    whole = losses_of(model, inputs)["global"]
    model.set_alignment_scale(0.0)
    found = losses_of(model, inputs)
    assert found["alignment"] == 0
    assert found["global"] == whole


def test_a_method_without_a_common_embedding_is_refused():
    with pytest.raises(InputError, match="--method avse share no global embedding"):
        tiny_model("avse", global_weight=0.5)
