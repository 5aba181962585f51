"""The contract that every registered method keeps; a new method is tested by being registered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from lib.batch import Tokens
from lib.methods.registry import get_method, method_names, register_method
from lib.model import kernels
from tests.helpers import encode, pair_inputs, tiny_model

# Parameters that a training step may leave without gradient, and why.
WITHOUT_GRADIENT: dict[str, dict[str, str]] = {}

# Methods whose embedding of a caption depends on its batch, and why.
BATCH_MATES_MATTER = {
    "d2s_released": "NOTE: its decoder reads padding, as the released code's does",
}

METHODS = method_names()


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def evaluated(method: str, inputs: dict, **flags) -> torch.Tensor:
    model = tiny_model(method, **flags).eval()
    with torch.no_grad():
        return model.similarity(*encode(model, inputs))


def test_similarity_is_finite_and_of_the_right_shape(method):
    similarity = evaluated(method, pair_inputs(method=method))
    assert similarity.shape == (6, 6)
    assert torch.isfinite(similarity).all()
    assert similarity.std() > 0


def test_a_vit_without_its_cls_serves_every_method(method):
    if not get_method(method).uses_pixels:
        pytest.skip("it reads no pixels")
    inputs = pair_inputs(method=method)
    model = tiny_model(method, image_cls=0).eval()
    assert model.image_encoder(inputs["pixels"]).cls is None
    assert not model.image_encoder.has_cls
    similarity = model.similarity(*encode(model, inputs))
    assert torch.isfinite(similarity).all()
    similarity.diagonal().sum().backward()
    assert any(one.grad is not None for one in model.parameters())


def test_evaluation_is_deterministic(method):
    inputs = pair_inputs(method=method)
    model = tiny_model(method).eval()
    with torch.no_grad():
        first = model.similarity(*encode(model, inputs))
        second = model.similarity(*encode(model, inputs))
    assert torch.equal(first, second)


def test_permuting_inputs_permutes_the_similarity(method):
    inputs = pair_inputs(method=method)
    model = tiny_model(method).eval()
    images, texts = torch.randperm(6), torch.randperm(6)
    with torch.no_grad():
        encoded_images, encoded_texts = encode(model, inputs)
        plain = model.similarity(encoded_images, encoded_texts)
        permuted = model.similarity(encoded_images[images], encoded_texts[texts])
    torch.testing.assert_close(permuted, plain[images][:, texts], atol=1e-5, rtol=0)


def test_padding_changes_nothing(method):
    inputs = pair_inputs(method=method)
    padded = dict(inputs)
    for name in ("ids", "dense_ids"):
        if name in inputs:
            # other words behind the end: whatever stands there must not be read
            junk = torch.randint(5, 100, (6, 4))
            padded[name] = torch.cat([inputs[name], junk], dim=1)
    torch.testing.assert_close(
        evaluated(method, padded), evaluated(method, inputs), atol=1e-5, rtol=0
    )


def test_batch_mates_change_nothing(method):
    inputs = pair_inputs(method=method)
    model = tiny_model(method).eval()
    with torch.no_grad():
        whole = model.similarity(*encode(model, inputs))
        differences = []
        for i in range(3):
            one = {name: value[i : i + 1] for name, value in inputs.items()}
            alone = model.similarity(*encode(model, one))
            differences.append(float((alone[0, 0] - whole[i, i]).abs()))
    assert (max(differences) > 1e-5) == (method in BATCH_MATES_MATTER)


@pytest.mark.parametrize(("images", "texts"), [(2, 6), (5, 1), (1, 4)])
def test_images_and_captions_in_unequal_numbers(method, images, texts):
    """A matrix of some images and some captions is that part of the whole one."""
    model = tiny_model(method).eval()
    with torch.no_grad():
        seen, said = encode(model, pair_inputs(method=method))
        whole = model.similarity(seen, said)
        part = model.similarity(seen[:images], said[6 - texts :])
    assert part.shape == (images, texts)
    torch.testing.assert_close(part, whole[:images, 6 - texts :], atol=1e-5, rtol=0)


def test_the_score_of_a_pair_depends_on_nothing_else_that_is_scored(method):
    """No candidate and no other query moves a score: each is scored alone, then beside others."""
    model = tiny_model(method).eval()
    others = pair_inputs(8, method=method, seed=5)
    with torch.no_grad():
        seen, said = encode(model, pair_inputs(method=method))
        more_seen, more_said = encode(model, others)
        whole = model.similarity(seen, said)
        for i, j in ((0, 0), (1, 4), (5, 2)):
            alone = model.similarity(seen[i : i + 1], said[j : j + 1])
            torch.testing.assert_close(alone[0, 0], whole[i, j], atol=1e-5, rtol=0)
        beside = model.similarity(Tokens.cat([seen, more_seen]), Tokens.cat([said, more_said]))
    torch.testing.assert_close(beside[:6, :6], whole, atol=1e-5, rtol=0)


def test_shard_size_changes_nothing(method):
    inputs = pair_inputs(method=method)
    whole = evaluated(method, inputs, shard_size=100)
    for size in (1, 4):
        torch.testing.assert_close(
            evaluated(method, inputs, shard_size=size), whole, atol=1e-5, rtol=0
        )


def test_shard_size_changes_no_gradient(method, monkeypatch):
    monkeypatch.setattr(kernels, "PAIRS_WITH_GRADIENT", 1)
    inputs = pair_inputs(method=method)
    gradients = []
    for size in (3, 100):
        model = tiny_model(method, shard_size=size).train()
        torch.manual_seed(0)
        model.training_losses(**inputs)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4, rtol=1e-3)


def test_chunks_are_computed_again_with_the_same_noise(method, monkeypatch):
    """PyTorch keeps the random state of the devices of tensors that it finds in the arguments."""
    infer, found = checkpoint._infer_device_type, []

    def noted(*args):
        found.append([any(torch.is_tensor(leaf) for leaf in tree_leaves(one)) for one in args])
        return infer(*args)

    monkeypatch.setattr(checkpoint, "_infer_device_type", noted)
    monkeypatch.setattr(kernels, "PAIRS_WITH_GRADIENT", 1)
    model = tiny_model(method, shard_size=3, max_violation=False).train()
    model.training_losses(**pair_inputs(method=method))["loss"].backward()
    assert found or not model.scores_repeat
    assert all(map(all, found)), found


def test_every_parameter_and_every_part_gets_gradient(method):
    model = tiny_model(method).train()
    torch.manual_seed(0)
    losses = model.training_losses(**pair_inputs(method=method))
    assert set(losses) >= {"loss", "alignment"}
    losses["loss"].backward()
    known = WITHOUT_GRADIENT.get(method, {})
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and name not in known
        and (parameter.grad is None or not bool(parameter.grad.abs().sum() > 0))
        and not _is_unused_embedding(name)
    ]
    assert silent == []


def _is_unused_embedding(name: str) -> bool:
    return "mask_token" in name


def test_hard_negatives_change_the_loss(method):
    inputs = pair_inputs(method=method)
    values = []
    for hard in (False, True):
        model = tiny_model(method).train()
        model.set_hard_negatives(hard)
        torch.manual_seed(0)
        values.append(float(model.training_losses(**inputs)["loss"].detach()))
    assert values[0] != values[1]


def test_runs_under_autocast(method):
    model = tiny_model(method).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.training_losses(**pair_inputs(method=method))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert losses["loss"].dtype == torch.float32
    for encoder in (model.image_encoder, model.text_encoder):
        if encoder is not None:  # a weight cast without a graph would stay without gradient
            assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_state_dict_round_trip(method):
    inputs = pair_inputs(method=method)
    model = tiny_model(method, seed=1).eval()
    other = tiny_model(method, seed=2).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(
            model.similarity(*encode(model, inputs)), other.similarity(*encode(other, inputs))
        )


def test_tokens_know_which_words_are_real(method):
    inputs = pair_inputs(method=method)
    model = tiny_model(method).eval()
    _, texts = encode(model, inputs)
    assert isinstance(texts, Tokens)
    assert texts.mask.dtype == torch.bool
    if texts.local.shape[1] > 1:  # a method that pools hands out one token
        assert torch.equal(texts.lengths, inputs["lengths"])


def test_missing_dense_text_is_an_error(method):
    inputs = pair_inputs(method=method)
    if "dense_ids" not in inputs:
        pytest.skip("reads no dense text")
    del inputs["dense_ids"], inputs["dense_lengths"]
    with pytest.raises(ValueError, match="dense"):
        tiny_model(method).training_losses(**inputs)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        register_method("seps")(type("Other", (get_method("seps"),), {}))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'sepps'; known: .*seps"):
        get_method("sepps")
