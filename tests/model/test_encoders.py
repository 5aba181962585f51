"""Encoders on small saved backbones: patch counts, [CLS], normalisation, names, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertModel, ViTModel

from lib.errors import InputError
from lib.model.backbones import hub_id
from lib.model.encoders import (
    EncoderSource,
    build_image_encoder,
    build_text_encoder,
)
from lib.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def test_vit_gives_patches_and_cls(backbones):
    encoder = build_image_encoder(backbones["vit"], 32, 224).eval()
    assert (encoder.num_patches, encoder.has_cls) == (49, True)
    assert isinstance(encoder.proj, torch.nn.Identity)  # the widths agree
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = encoder(pixels)
        expected = ViTModel.from_pretrained(backbones["vit"], add_pooling_layer=False).eval()(
            pixels
        )
    whole = torch.cat([tokens.cls, tokens.local], dim=1)
    torch.testing.assert_close(whole, expected.last_hidden_state)
    assert tokens.mask.all()


def test_another_resolution_interpolates_the_positions(backbones):
    encoder = build_image_encoder(backbones["vit"], 16, 256).eval()
    assert encoder.num_patches == 64
    assert encoder(torch.zeros(1, 3, 256, 256)).local.shape == (1, 64, 16)


@pytest.mark.parametrize(("img_res", "patches"), [(224, 49), (256, 64)])
def test_swin_has_no_cls(backbones, img_res, patches):
    encoder = build_image_encoder(backbones["swin"], 24, img_res).eval()
    assert (encoder.num_patches, encoder.has_cls, encoder.width) == (patches, False, 64)
    tokens = encoder(torch.zeros(1, 3, img_res, img_res))
    assert tokens.cls is None
    assert tokens.local.shape == (1, patches, 24)


def test_uint8_pixels_are_normalised_on_the_way_in(backbones):
    encoder = build_image_encoder(backbones["vit"], 32, 224).eval()
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels).local, encoder((pixels / 255 - mean) / std).local
        )


def test_bert_reads_no_padding(backbones):
    encoder = build_text_encoder(backbones["bert"], 32, vocab_size=50, max_word=20).eval()
    ids = torch.randint(5, 50, (2, 7))
    lengths = torch.tensor([7, 4])
    with torch.no_grad():
        tokens = encoder(ids, lengths)
        alone = encoder(ids[1:, :4], lengths[1:])
        bert = BertModel.from_pretrained(backbones["bert"], add_pooling_layer=False).eval()
        expected = bert(input_ids=ids[:1]).last_hidden_state
    torch.testing.assert_close(tokens.local[1, :4], alone.local[0])
    torch.testing.assert_close(tokens.local[:1], expected)
    assert tokens.lengths.tolist() == [7, 4]


def test_short_names_stand_for_hub_ids(tmp_path, monkeypatch):
    assert hub_id("vit") == "google/vit-base-patch16-224-in21k"
    assert hub_id("swin_384") == "microsoft/swin-base-patch4-window12-384"
    assert hub_id("vit-base-patch16-384") == "google/vit-base-patch16-384"
    assert hub_id("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert hub_id("bert-base-uncased") == "bert-base-uncased"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit-mine").mkdir()
    assert hub_id("vit-mine") == "vit-mine"


def test_unsupported_and_unfitting_encoders_are_refused(backbones, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        build_image_encoder(str(tmp_path), 32, 224)
    with pytest.raises(InputError, match="vocabulary has 9999 words"):
        build_text_encoder(backbones["bert"], 32, vocab_size=9999, max_word=20)


def test_a_saved_config_rebuilds_without_files():
    source = EncoderSource("tiny", "tiny", 32, 32, 60, 20, tiny_width=32, tiny_patch_size=8)
    image, text = source.image(), source.text()
    again = EncoderSource(
        "nowhere",
        "nowhere",
        32,
        32,
        60,
        20,
        image_config=image.backbone.config.to_dict(),
        text_config=text.backbone.config.to_dict(),
    )
    assert again.image().num_patches == image.num_patches == 16
    assert again.text().state_dict().keys() == text.state_dict().keys()
