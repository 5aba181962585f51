"""Checkpoints: plain data, whole after a crash, refused where they do not fit or would execute."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import signal
import sys
from multiprocessing import get_context

import pytest
import torch

from lib.checkpoints.checkpoint import (
    load_model,
    load_training_state,
    load_weights,
    model_payload,
    save_payload,
)
from lib.errors import InputError
from lib.methods.registry import method_names
from tests.helpers import encode, pair_inputs, tiny_args, tiny_model


def save_model(path, model, args, vocabulary=None, **facts):
    save_payload(path, {**model_payload(model, args, vocabulary), **facts})


@pytest.mark.parametrize("method", method_names())
def test_a_model_comes_back_the_same(method, tmp_path):
    model, args = tiny_model(method).eval(), tiny_args(method)
    inputs = pair_inputs(method=method)
    save_model(tmp_path / "model.pth", model, args, ["[PAD]", "word"], epoch=3)
    again, loaded = load_model(tmp_path / "model.pth")
    assert not again.training
    assert loaded.method == method
    with torch.no_grad():
        first = model.similarity(*encode(model, inputs))
        assert torch.equal(again.similarity(*encode(again, inputs)), first)


def test_flags_younger_than_the_checkpoint_take_their_defaults(tmp_path):
    model, args = tiny_model(), tiny_args()
    del args.relevance_topk
    save_model(tmp_path / "model.pth", model, args)
    assert load_model(tmp_path / "model.pth")[1].relevance_topk == 5


def test_a_missing_a_left_over_and_a_reshaped_weight_are_named():
    model = tiny_model()
    state = model.state_dict()
    state["extra.weight"] = torch.zeros(1)
    state["sparse_head.scale"] = torch.zeros(2)
    del state["dense_head.scale"]
    with pytest.raises(InputError) as caught:
        load_weights("x.pth", model, state)
    message = str(caught.value)
    assert "missing: dense_head.scale" in message
    assert "left over: extra.weight" in message
    assert "of another shape: sparse_head.scale" in message


def test_backbone_names_of_another_transformers_are_understood():
    """The names of transformers 4.45, written from memory of its modules, and today's."""
    model = tiny_model()
    state, renamed = model.state_dict(), {}
    for key, value in state.items():
        if "image_encoder.backbone.layers" in key:
            key = key.replace("backbone.layers.", "backbone.encoder.layer.")
            for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                key = key.replace(f"attention.{new}", f"attention.attention.{old}")
            key = key.replace("attention.o_proj", "attention.output.dense")
            key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        renamed[key] = value
    other = tiny_model(seed=5)
    load_weights("x.pth", other, renamed)
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key


class Touch:
    """Unpickling this would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused_by_name(tmp_path):
    target = tmp_path / "executed"
    torch.save({"model": {}, "opt": Touch(str(target))}, tmp_path / "evil.pth")
    with open(tmp_path / "bare.pth", "wb") as file:
        pickle.dump({"opt": Touch(str(target))}, file)
    with pytest.raises(InputError, match="mkdir"):
        load_model(tmp_path / "evil.pth", method="laps")
    with pytest.raises(InputError):
        load_model(tmp_path / "bare.pth", method="laps")
    assert not target.exists()


def test_other_files_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="neither one of our checkpoints nor an official one"):
        load_model(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match=r"text\.pth"):
        load_model(tmp_path / "text.pth")
    save_model(tmp_path / "model.pth", tiny_model(), tiny_args())
    with pytest.raises(InputError, match="holds no training state"):
        load_training_state(tmp_path / "model.pth")
    with pytest.raises(InputError, match="holds a seps model"):
        load_model(tmp_path / "model.pth", method="laps")


def test_a_newer_format_is_refused(tmp_path):
    save_model(tmp_path / "model.pth", tiny_model(), tiny_args(), version=99)
    with pytest.raises(InputError, match="version 99"):
        load_model(tmp_path / "model.pth")


def write_beyond_the_limit(path: str, results) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_payload(path, {"model": torch.ones(100_000)})
        results.put("written")
    except OSError as error:
        results.put(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as on Linux")
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "model_best.pth"
    save_payload(path, {"model": torch.zeros(3)})
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=write_beyond_the_limit, args=(str(path), results))
    process.start()
    message = results.get(timeout=60)
    process.join()
    assert "could not be written" in message
    assert "--resume" in message
    assert torch.load(path, weights_only=True)["model"].tolist() == [0, 0, 0]
    assert os.listdir(tmp_path) == ["model_best.pth"]  # no temporary file is left


def test_arguments_are_stored_as_plain_values(tmp_path):
    args = argparse.Namespace(**{**vars(tiny_args()), "odd": {1, 2}, "path": tmp_path})
    save_model(tmp_path / "model.pth", tiny_model(), args)
    payload = torch.load(tmp_path / "model.pth", weights_only=True)
    assert isinstance(payload["args"]["path"], str)
