"""The [CLS] attention of an image encoder: read off a plain ViT, and where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel

from lib.errors import InputError
from lib.model.attention import cls_attention
from lib.model.encoders import ImageEncoder

CPU = torch.device("cpu")


def vit() -> ViTModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=32, patch_size=8, intermediate_size=64, **shape)
    model = ViTModel(config, add_pooling_layer=False).eval()
    for one in model.parameters():  # far from the even attention of a new model
        torch.nn.init.normal_(one, std=0.5)
    return model


def test_the_map_is_that_of_the_last_layer():
    backbone = vit()
    encoder = ImageEncoder(backbone, 16, 32).eval()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = cls_attention(encoder, CPU)(pixels)
    plain = ViTModel(backbone.config, add_pooling_layer=False).eval()
    plain.load_state_dict(backbone.state_dict())
    plain.config._attn_implementation = "eager"
    layer = plain.encoder.layer[-1] if hasattr(plain, "encoder") else plain.layers[-1]
    seen = {}
    layer.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    with torch.no_grad():
        plain(encoder.normalise(pixels))
        hidden = layer.layernorm_before(seen["hidden"])  # (3, 17, 32)
        weights = {
            name: one
            for name, one in layer.named_parameters()
            if "query" in name or "key" in name or "q_proj" in name or "k_proj" in name
        }
    query, key = (
        torch.nn.functional.linear(
            hidden,
            next(one for name, one in weights.items() if part in name and name.endswith("weight")),
            next(one for name, one in weights.items() if part in name and name.endswith("bias")),
        )
        .view(3, 17, 4, 8)
        .transpose(1, 2)
        for part in (
            ("query", "key") if any("query" in name for name in weights) else ("q_proj", "k_proj")
        )
    )
    rows = (query[:, :, :1] @ key.transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    expected = rows / rows.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 0.01


def test_an_encoder_without_cls_is_refused():
    shape = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    backbone = SwinModel(SwinConfig(image_size=32, patch_size=4, **shape), add_pooling_layer=False)
    with pytest.raises(InputError, match="SwinModel has no \\[CLS\\]"):
        cls_attention(ImageEncoder(backbone, 16, 32), CPU)
