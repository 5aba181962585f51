"""LoRA: low-rank layers alone learn, add nothing at first, and travel in the checkpoint."""

from __future__ import annotations

import sys

import pytest
import torch

import train
from lib.checkpoints import load_model
from lib.errors import InputError
from lib.model.lora import add_lora
from lib.training.optim import parameter_groups
from tests.helpers import pair_inputs, tiny_model


def test_low_rank_layers_alone_learn_and_add_nothing_at_first():
    pytest.importorskip("peft", reason="peft is an extra")
    plain, adapted = tiny_model("laps").eval(), tiny_model("laps", lora_rank=4).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for model in (plain, adapted):  # the same heads on both
            torch.manual_seed(0)
            model.image_encoder.proj = torch.nn.Identity()
        first, second = plain.image_encoder, adapted.image_encoder
        state = {key.replace("base_layer.", ""): v for key, v in second.state_dict().items()}
        first.load_state_dict({key: v for key, v in state.items() if "lora_" not in key})
        torch.testing.assert_close(second(pixels).local, first(pixels).local)
    for encoder in (adapted.image_encoder, adapted.text_encoder):
        asking = [n for n, p in encoder.backbone.named_parameters() if p.requires_grad]
        assert asking
        assert all("lora_" in name for name in asking)
    adapted.train().training_losses(**pair_inputs(method="laps"))["loss"].backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)


def test_low_rank_layers_learn_at_the_whole_rate():
    pytest.importorskip("peft", reason="peft is an extra")
    groups = parameter_groups(tiny_model("laps", lora_rank=2), 1.0, 0.1, 0.0)
    assert [group["name"] for group in groups] == ["heads"]


def test_a_run_with_lora_on_one_side_comes_back(scenes_path, tmp_path):
    pytest.importorskip("peft", reason="peft is an extra")
    flags = (
        "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
        "--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1 --method laps "
        "--lora_rank 3 --freeze image"
    )
    places = ["--data_path", str(scenes_path), "--logger_name", str(tmp_path / "run")]
    assert train.main([*flags.split(), *places]) == 0
    model, args = load_model(tmp_path / "run" / "model_best.pth")
    assert args.lora_rank == 3
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names
    assert all(name.startswith("text_encoder.") for name in names)


def test_what_lora_can_not_do_is_one_sentence(monkeypatch):
    with pytest.raises(InputError, match="no backbone is left to adapt"):
        tiny_model("laps", lora_rank=2, freeze="both")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="--lora_rank needs peft, which is not installed"):
        add_lora(torch.nn.Linear(2, 2), 2)
