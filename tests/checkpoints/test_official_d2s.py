"""Official checkpoints of D2S-VSE: every weight accounted for."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from lib.checkpoints.checkpoint import load_model
from lib.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "d2s_modules.npz"


def d2s_payload(tmp_path, stage: int = 2, prefix: str = "", **flags) -> tuple[dict, dict]:
    """A checkpoint of D2S-VSE's layout around tiny backbones, and the folders of their configs."""
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(image_size=32, patch_size=8, intermediate_size=16, **small))
    configs = {"vit_path": vit, "bert_path": None}
    bert = {**small, "hidden_size": 20, "intermediate_size": 16, "vocab_size": 60}
    texts = [BertModel(BertConfig(**bert, max_position_embeddings=512)) for _ in range(2)]
    configs["bert_path"] = texts[0]
    for name, model in configs.items():
        model.config.save_pretrained(tmp_path / name)
    with np.load(GOLDEN) as file:
        heads = {k[8:]: torch.tensor(file[k]) for k in file if k.startswith("weights.")}
    parts = {
        "img_enc.visual_encoder.": vit,
        "txt_enc.bert.": texts[0],
        "long_txt_enc.bert.": texts[1],
    }
    state = {k: v for k, v in heads.items() if stage == 2 or k.startswith(("img_enc", "txt_enc"))}
    for name, model in parts.items():
        if stage == 2 or not name.startswith("long"):
            state |= {name + key: value for key, value in model.state_dict().items()}
    opt = argparse.Namespace(
        dataset="f30k",
        img_res=32,
        embed_size=32,
        vit_type="vit",
        bert_path="../weights_models/bert-base-uncased",
        pretrain=stage == 1,
        distill=stage == 2,
        weight_path="./runs/test_pretrain/model_best.pth",
        num_tokens=6,
        use_decoder=True,
        decoder_depth=4,
        gpo=False,
        no_res_embed=True,  # the official default: the residual is on
        shard_size=256,
        **flags,
    )
    payload = {"model": {prefix + key: value for key, value in state.items()}, "opt": opt}
    return payload, {name: str(tmp_path / name) for name in configs}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_d2s_checkpoint_loads_whole(tmp_path, prefix):
    payload, paths = d2s_payload(tmp_path, prefix=prefix)
    torch.save(payload, tmp_path / "model_best.pth")
    model, args = load_model(tmp_path / "model_best.pth", **paths)
    assert model.name == "d2s_released"
    assert model.residual
    assert args.distill
    state, own = payload["model"], model.state_dict()
    official = {key.removeprefix("module."): value for key, value in state.items()}
    torch.testing.assert_close(own["prompt.tokens"], official["prompt_learner.prompt_tokens"])
    torch.testing.assert_close(
        own["teacher.head.features.mlp.1.running_mean"]
        + official["long_txt_enc.mlp.layers.0.bias"],
        official["long_txt_enc.mlp.bns.0.running_mean"],
    )
    teacher = [key for key in own if key.startswith("teacher.encoder.backbone.")]
    assert any(
        not torch.equal(own[key], own[key.replace("teacher.encoder", "text_encoder")])
        for key in teacher
    )
    # as many numbers as in the file, but for what nothing reads and the biases BatchNorm cancels
    spared = ("mask_token", "mlp.bns.1.", "mlp.layers.0.bias", ".pooler.")
    read = sum(v.numel() for k, v in official.items() if not any(one in k for one in spared))
    assert sum(value.numel() for value in own.values()) == read
    ours, _ = load_model(tmp_path / "model_best.pth", method="d2s", **paths)
    assert ours.name == "d2s"


def test_a_d2s_checkpoint_gives_the_official_embeddings(tmp_path):
    """The backbones' outputs through the recorded heads, computed here as SPEC 11 has them."""
    payload, paths = d2s_payload(tmp_path)
    torch.save(payload, tmp_path / "model_best.pth")
    model, _ = load_model(tmp_path / "model_best.pth", **paths)
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    lengths = torch.tensor([4, 3])
    state = payload["model"]
    with torch.no_grad():
        found = model.encode_texts(ids, lengths).local[:, 0]
        hidden = model.text_encoder.backbone(
            input_ids=ids, attention_mask=(ids != 0).long()
        ).last_hidden_state
        inner = hidden @ state["txt_enc.mlp.layers.0.weight"].T + state["txt_enc.mlp.layers.0.bias"]
        norm = "txt_enc.mlp.bns.0."
        inner = (inner - state[f"{norm}running_mean"]) / (state[f"{norm}running_var"] + 1e-5).sqrt()
        inner = (inner * state[f"{norm}weight"] + state[f"{norm}bias"]).relu()
        features = hidden @ state["txt_enc.fc.weight"].T + state["txt_enc.fc.bias"]
        features = features + inner @ state["txt_enc.mlp.layers.1.weight"].T
        features = features + state["txt_enc.mlp.layers.1.bias"]
        mask = torch.arange(4) < lengths[:, None]
        pooled = model.text_head.norm(model.text_head.pool(features, mask))
        prompt = model.prompt(features, torch.ones_like(mask))
        expected = pooled + prompt / prompt.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_d2s_checkpoint_of_stage_1_is_a_model_too(tmp_path):
    payload, paths = d2s_payload(tmp_path, stage=1)
    torch.save(payload, tmp_path / "model_best.pth")
    model, args = load_model(tmp_path / "model_best.pth", **paths)
    assert model.prompt is None
    assert args.pretrain


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_d2s_weight_that_does_not_fit_is_named(tmp_path, change):
    payload, paths = d2s_payload(tmp_path)
    if change == "missing":
        del payload["model"]["prompt_learner.decoder_norm.bias"]
    else:
        payload["model"]["txt_enc.mlp.bns.2.weight"] = torch.ones(3)
    torch.save(payload, tmp_path / "model_best.pth")
    with pytest.raises(InputError, match=change):
        load_model(tmp_path / "model_best.pth", **paths)


def test_a_d2s_file_is_no_laps_model(tmp_path):
    payload, paths = d2s_payload(tmp_path)
    torch.save(payload, tmp_path / "model_best.pth")
    with pytest.raises(InputError, match="this file is a D2S-VSE model"):
        load_model(tmp_path / "model_best.pth", method="laps", **paths)
