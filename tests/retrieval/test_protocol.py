"""The oracle mark: by what queries carried, by every route there is to it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import validation_loaders
from lib.batch import Batch
from lib.data.splits import Split
from lib.distributed import world_size
from lib.methods.registry import method_names
from lib.retrieval.ensemble import ensemble_facts
from lib.retrieval.evaluation import SplitLoaders, evaluate_split, score_split
from lib.retrieval.protocol import protocol_of, repeated_captions, strictest
from tests.helpers import pair_inputs, tiny_args, tiny_model
from vocab import WordTokenizer, learn_vocabulary


def loaders_of(inputs, owner):
    """One batch of images and one of captions, as the data loaders hand them out."""
    dense = {name: inputs[name] for name in ("dense_ids", "dense_lengths") if name in inputs}
    pairs = len(inputs["ids"])
    return SplitLoaders(
        images=[Batch(pixels=inputs["pixels"], **(dense if owner == "image" else {}))],
        captions=[
            Batch(
                ids=inputs["ids"],
                lengths=inputs["lengths"],
                **(dense if owner == "caption" else {}),
            )
        ],
        caption_images=np.arange(pairs),
        num_images=pairs,
    )


def measured_protocol(model, inputs):
    loaders = loaders_of(inputs, model.dense_owner)
    results = evaluate_split(model, loaders, torch.device("cpu"), torch.no_grad, False)
    return results["protocol"]


@pytest.mark.parametrize("method", method_names())
def test_every_method_is_marked_by_what_its_batches_carry(method):
    model = tiny_model(method)
    measured = measured_protocol(model, pair_inputs(method=method))
    assert measured == model.protocol


@pytest.mark.parametrize(
    ("side", "protocol"), [("image", "image"), ("caption", "oracle"), ("none", "none")]
)
def test_each_dense_side(side, protocol):
    inputs = pair_inputs(method="seps", dense_side=side)
    assert measured_protocol(tiny_model("seps", dense_side=side), inputs) == protocol


def test_a_method_that_calls_itself_honest_is_marked_all_the_same(monkeypatch):
    model = tiny_model("seps", dense_side="caption")
    monkeypatch.setattr(type(model), "protocol", property(lambda self: "image"))
    assert measured_protocol(model, pair_inputs(method="seps", dense_side="caption")) == "oracle"


def test_dense_texts_that_repeat_the_captions_make_an_oracle():
    captions = ["a man rides a red bike", "two dogs run on the wet grass", "a dog", "a child sits"]
    owners = np.array([0, 1, 1, 2])
    honest = ["The image shows a cyclist.", "There are dogs: two of them.", "A child."]
    told = ["Here: A man rides a red bike!", "Two dogs run, on the wet grass.", "A child."]
    assert repeated_captions(honest, captions, owners) == 0.0
    assert repeated_captions(told, captions, owners) == pytest.approx(2 / 3)
    assert repeated_captions(["a dog and a child sits"] * 3, captions, owners) == 0.0  # too short
    assert protocol_of(True, False, 2 / 3) == "oracle"
    assert protocol_of(True, False, 0.003) == "image"  # what real descriptions reach by chance
    assert protocol_of(False, False, 1.0) == "none"  # read by nobody


def test_validation_is_marked_where_dense_texts_repeat_captions():
    model, inputs = tiny_model("seps"), pair_inputs(method="seps")
    for share, protocol in ((0.0, "image"), (0.5, "oracle")):
        loaders = replace(loaders_of(inputs, "image"), repeated_share=share)
        found = evaluate_split(model, loaders, torch.device("cpu"), torch.no_grad, False)
        assert found["protocol"] == protocol


def test_the_loaders_of_a_split_know_the_share(layouts):
    args = tiny_args("seps", data_path=str(layouts), workers=0, batch_size=4)
    told = Split(
        dataset="f30k",
        name="dev",
        captions=["a man rides a red bike", "two dogs run on wet grass"],
        image_ids=["1", "2"],
        image_files=["1.jpg", "2.jpg"],
        caption_image=np.array([0, 1]),
        dense=["Here: a man rides a red bike.", "Dogs."],
    )
    tokenizer = WordTokenizer(learn_vocabulary(told.captions))
    assert validation_loaders(args, told, tokenizer, "image", False).repeated_share == 0.5


def test_an_ensemble_is_marked_by_the_member_that_was_told_most():
    members = [
        {"method": name, "protocol": protocol, "val_split": "dev"}
        for name, protocol in (("laps", "none"), ("seps_released", "oracle"), ("seps", "image"))
    ]
    assert ensemble_facts(members)["protocol"] == "oracle"
    assert strictest(["none", "image"]) == "image"


def test_scores_say_what_was_carried():
    assert world_size() == 1
    model = tiny_model("seps", dense_side="caption")
    inputs = pair_inputs(method="seps", dense_side="caption")
    scores = score_split(model, loaders_of(inputs, "caption"), torch.device("cpu"), torch.no_grad)
    assert scores.carried == (False, True)
    assert scores.matrix.shape == (6, 6)


@pytest.fixture(scope="module")
def oracle_run(tmp_path_factory, scenes_path):
    folder = tmp_path_factory.mktemp("oracle") / "scenes_oracle"
    argv = ["--dataset", "scenes", "--data_path", str(scenes_path), "--num_epochs", "1"]
    argv += ["--scenes_size", "32,16,16", "--img_res", "64", "--batch_size", "16", "--workers", "0"]
    argv += ["--method", "seps", "--dense_side", "caption", "--logger_name", str(folder)]
    assert train.main(argv) == 0
    return folder


def test_the_programs_print_and_store_the_mark(oracle_run, scenes_path, capsys):
    assert "(oracle)" in (oracle_run / "train.log").read_text()
    argv = ["--data_path", str(scenes_path), "--workers", "0"]
    checkpoint = ["--checkpoint", str(oracle_run / "model_best.pth")]
    assert evaluation.main([*argv, *checkpoint]) == 0
    assert evaluation.main([*argv, *checkpoint, "--rerank", "5"]) == 0
    both = ["--ensemble", str(oracle_run), str(oracle_run), "--runs", str(oracle_run.parent)]
    assert evaluation.main([*argv, *both]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("protocol oracle") == 3
    assert printed.count("queries carried text made from their own answers") == 3
    own = json.loads((oracle_run / "results.json").read_text())
    assert {name: one["protocol"] for name, one in own.items()} == {
        "scenes": "oracle",
        "scenes_rerank5": "oracle",
    }
    name = f"{oracle_run.name}+{oracle_run.name}"
    summed = json.loads((oracle_run.parent / "ensembles" / name / "results.json").read_text())
    assert summed["scenes_ensemble"]["protocol"] == "oracle"
