"""The [CLS] attention of an image encoder: read off a plain ViT, and where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, SwinConfig, SwinModel, ViTConfig, ViTModel

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
    found = cls_attention(encoder, CPU)(pixels)  # (3, 16)
    plain = AutoModel.from_config(backbone.config, attn_implementation="eager").eval()
    plain.load_state_dict(backbone.state_dict(), strict=False)
    with torch.no_grad():
        maps = plain(encoder.normalise(pixels), output_attentions=True).attentions
    heads = maps[1][:, :, 0, 1:]  # of the second layer, from [CLS] to the 16 patches
    expected = heads.mean(1) / heads.mean(1).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, torch.full_like(found, 1 / 16), atol=0.01)


def test_an_encoder_without_cls_is_refused():
    shape = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    backbone = SwinModel(SwinConfig(image_size=32, patch_size=4, **shape), add_pooling_layer=False)
    with pytest.raises(InputError, match="SwinModel has no \\[CLS\\]"):
        cls_attention(ImageEncoder(backbone, 16, 32), CPU)
