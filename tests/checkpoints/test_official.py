"""Official checkpoints: read safely, converted exactly, and the recorded numbers reproduced.

`golden/official/*.npz` were made from recordings of the official code (PyTorch 2.13, transformers
4.44, CPU, float32, dropout 0, tiny random weights): `opt` and `model/*` are the checkpoint, the
rest inputs and outputs, rows that repeat nothing left out. The `ilaps_*` ones hold the backbones'
hidden states instead of pixels and backbone weights; the backbones come from `laps_vit`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.checkpoints.checkpoint import load_model
from lib.checkpoints.official import converted_state, is_official
from lib.checkpoints.payloads import read_payload
from lib.errors import InputError
from tools import convert_checkpoint

FOLDER = Path(__file__).parents[1] / "golden" / "official"
METHOD = {
    "laps_vit": "laps",
    "laps_swin": "laps",
    "seps_vit": "seps_released",
    "seps_swin": "seps_released",
    "ilaps_attn": "ilaps",
    "ilaps_thres": "ilaps",
    "ilaps_score": "ilaps",
}
WHOLE = [name for name in METHOD if not name.startswith("ilaps")]
GRADIENTS = {
    "grad_aggr0": "network.head.weight.1.weight",
    "grad_vision_proj": "image_encoder.proj.weight",
    "grad_text_fc": "text_encoder.proj.weight",
}


def recording(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        values = {key: file[key] for key in file.files if key != "opt"}
    return {
        key: torch.from_numpy(
            np.asarray(value.astype(np.int64) if value.dtype == np.int16 else value)
        )
        for key, value in values.items()
    }


def official_payload(name: str) -> dict:
    """The checkpoint in the official layout."""
    with np.load(FOLDER / f"{name}.npz") as file:
        opt = argparse.Namespace(**json.loads(str(file["opt"])))
    state = {} if name in WHOLE else official_payload("laps_vit")["model"]
    own = {k.removeprefix("model/"): v for k, v in recording(name).items() if k[:6] == "model/"}
    return {"epoch": 3, "best_rsum": 123.4, "Eiters": 77, "opt": opt, "model": {**state, **own}}


def backbones(name: str) -> tuple[str, str]:
    return str(FOLDER / ("swin" if "swin" in name else "vit")), str(FOLDER / "bert")


def load(name: str, folder: Path, method: str | None = None):
    path = folder / "model_best.pth"
    torch.save(official_payload(name), path)
    return load_model(path, method or METHOD[name], *backbones(name))[0]


class Recorded:
    """A recording's model and inputs; hidden states stand in where the recording holds them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.values = recording(name)
        self.model = load(name, folder)
        if name in WHOLE:
            self.pixels = self.values["images"].float()
            self.ids = self.values["caption_ids"]
        else:
            self.pixels = self.values["image_hidden"]
            self.ids = torch.arange(10)[:, None].expand(-1, self.values["word_hidden"].shape[1])
            self.model.image_encoder.hidden = lambda hidden: hidden
            self.model.text_encoder.hidden = lambda ids, mask: self.values["word_hidden"][ids[:, 0]]
        self.lengths = self.values["caption_lengths"]

    def dense(self, count: int = 10) -> dict:
        names = ("dense_ids", "dense_lengths")
        return {key: self.values[key][:count] for key in names if key in self.values}

    @torch.no_grad()
    def encode(self):
        return (
            self.model.encode_images(self.pixels),
            self.model.encode_texts(self.ids, self.lengths, **self.dense()),
        )


@pytest.fixture(params=METHOD)
def recorded(request, tmp_path) -> Recorded:
    return Recorded(request.param, tmp_path)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_encoders(recorded):
    images, texts = recorded.encode()
    patches = images.local if images.cls is None else torch.cat([images.cls, images.local], 1)
    close(patches[:2], recorded.values["patches"])
    for tokens, name in ((texts, "words"), (texts.dense, "dense_words")):
        if name in recorded.values:
            expected = recorded.values[name]
            real = tokens.mask[: len(expected), :, None]
            close(tokens.local[: len(expected)] * real, expected * real)


def test_similarity(recorded):
    close(recorded.model.similarity(*recorded.encode()), recorded.values["similarity"])


@pytest.mark.parametrize("negatives", ["sum", "hard"])
def test_training_step(recorded, negatives):
    model, values = recorded.model.train(), recorded.values
    model.set_hard_negatives(negatives == "hard")
    losses = model.training_losses(
        recorded.pixels,
        recorded.ids[:6],
        recorded.lengths[:6],
        values["image_ids"],
        **recorded.dense(6),
    )
    close(losses["loss"].detach(), values[f"loss_{negatives}"])
    losses["loss"].backward()
    parameters = dict(model.named_parameters())
    for name, parameter in GRADIENTS.items():
        expected = values[f"{name}_{negatives}"]
        gradient = parameters[parameter].grad
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        close(gradient, expected, tolerance=1e-4 * float(expected.abs().max()))


def test_a_converted_file_gives_the_same(tmp_path):
    vit, bert = backbones("seps_vit")
    before = Recorded("seps_vit", tmp_path)
    matrix = before.model.similarity(*before.encode())
    for out in ("own.pth", "own.safetensors"):
        command = [str(tmp_path / "model_best.pth"), str(tmp_path / out)]
        command += ["--method", "seps_released", "--vit_path", vit, "--bert_path", bert]
        assert convert_checkpoint.main(command) == 0
        before.model, args = load_model(tmp_path / out)
        assert args.method == "seps_released"
        assert torch.equal(before.model.similarity(*before.encode()), matrix)
        assert len(read_payload(tmp_path / out)["vocabulary"]) == 300


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("laps_vit", "own.bin", "end the name in"),
        ("laps_vit", "model_best.pth", "the input itself"),
    ],
)
def test_conversion_refuses(name, out, message, tmp_path, capsys):
    path = tmp_path / "model_best.pth"
    torch.save(official_payload(name), path)
    assert convert_checkpoint.main([str(path), str(tmp_path / out), "--method", "laps"]) == 2
    assert message in capsys.readouterr().err


def test_ilaps_is_recognised_by_its_flags(tmp_path):
    torch.save(official_payload("ilaps_attn"), tmp_path / "x.pth")
    model, args = load_model(tmp_path / "x.pth", None, *backbones("ilaps_attn"))
    assert model.name == args.method == "ilaps"


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("laps_vit", None, "does not tell LAPS from SEPS"),
        ("laps_vit", "seps", "seps_released"),
        ("laps_vit", "ilaps", "none of improved LAPS's flags"),
        ("ilaps_thres", "laps", "--method ilaps"),
    ],
)
def test_method_that_does_not_fit(name, method, message, tmp_path):
    torch.save(official_payload(name), tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "x.pth", method, *backbones(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("img_enc.visual_encoder.layernorm.bias"),
            r"missing: .*layernorm\.bias",
        ),
        (lambda state: state.pop("cross_net.aggr_net.scale"), r"missing: network\.head\.scale"),
        (lambda state: state.update(extra=torch.ones(1)), "left over: extra"),
        (
            lambda state: state.update({"txt_enc.fc.weight": torch.ones(3, 3)}),
            r"another shape: text_encoder\.proj\.weight \(3, 3\) instead of \(32, 48\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    payload = official_payload("laps_vit")
    change(payload["model"])
    torch.save(payload, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "x.pth", "laps", *backbones("laps_vit"))


def test_two_official_keys_never_fill_one_weight():
    own = {"image_encoder.backbone.layers.0.mlp.fc1.bias": torch.zeros(2)}
    stems = ("encoder.layer.0.intermediate.dense.bias", "layers.0.mlp.fc1.bias")
    official = {f"img_enc.visual_encoder.{stem}": torch.ones(2) for stem in stems}
    with pytest.raises(InputError, match=r"left over: img_enc\.visual_encoder\.layers"):
        converted_state(official, own)


def test_a_wrong_backbone_config_is_named(tmp_path):
    torch.save(official_payload("laps_vit"), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"--vit_path .*bert config"):
        load_model(tmp_path / "x.pth", "laps", str(FOLDER / "bert"), str(FOLDER / "bert"))


def test_missing_opt_is_told(tmp_path):
    payload = official_payload("laps_vit")
    payload["opt"] = {"embed_size": 32}
    torch.save(payload, tmp_path / "x.pth")
    with pytest.raises(InputError, match="no `opt`"):
        load_model(tmp_path / "x.pth", "laps", *backbones("laps_vit"))


def test_what_counts_as_official():
    state = {"module.img_enc.vision_proj.weight": torch.ones(1)}
    assert is_official({"model": state, "opt": argparse.Namespace()})
    assert not is_official({"model": state, "format": "seps-checkpoint"})
    assert not is_official({"weights": state})


# --- files that must not be trusted ---------------------------------------------------------------


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_by_name_and_not_run(zipped, tmp_path):
    payload = official_payload("laps_vit")
    payload["opt"].hook = Malicious(tmp_path / "ran")
    torch.save(payload, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"(posix|nt)\.mkdir"):
        load_model(tmp_path / "x.pth", "laps", *backbones("laps_vit"))
    assert not (tmp_path / "ran").exists()


def test_unknown_classes_are_refused_by_name(tmp_path):
    torch.save({"model": {}, "opt": Path("x")}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"refused, because it asks to load pathlib\.[\w.]+"):
        read_payload(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off", b"\x80\x02}q\x00"])
def test_damaged_files_are_told(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_payload(tmp_path / name)


def test_a_truncated_checkpoint_is_told(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(official_payload("laps_vit"), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_payload(path)


def test_missing_files_and_other_contents_are_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_payload(tmp_path / "none.pth")
    torch.save(torch.ones(2), tmp_path / "x.pth")
    with pytest.raises(InputError, match="holds a Tensor"):
        read_payload(tmp_path / "x.pth")
