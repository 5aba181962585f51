"""Each family of image encoders, tiny and random, saved to disk and loaded as a user's is."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, ResNetConfig, ResNetModel

from lib.errors import InputError
from lib.model.encoders import ImageEncoder, build_image_encoder
from lib.model.preprocessing import CLIP_MEAN, Preprocessing

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
    "patch_size": 4,
}
TOWERS = {"vision_config": {**SMALL, "image_size": 32, "patch_size": 8}, "text_config": SMALL}
# name: (config class, its arguments, [CLS], registers)
FAMILIES = {
    "vit": ("ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, True, 0),
    "deit": ("DeiTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, True, 1),
    "beit": (
        "BeitConfig",
        {**SMALL, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True},
        True,
        0,
    ),
    "dinov2": ("Dinov2Config", {**SMALL, "image_size": 32, "patch_size": 8}, True, 0),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        {**SMALL, "image_size": 32, "patch_size": 8, "num_register_tokens": 3},
        True,
        3,
    ),
    "dinov3": (
        "DINOv3ViTConfig",
        {**SMALL, "image_size": 32, "patch_size": 8, "num_register_tokens": 4},
        True,
        4,
    ),
    "swin": ("SwinConfig", {**SWIN, "image_size": 64}, False, 0),
    "swinv2": ("Swinv2Config", {**SWIN, "image_size": 64}, False, 0),
    "clip": ("CLIPConfig", TOWERS, True, 0),
    "clip_vision": (
        "CLIPVisionConfig",
        {**SMALL, "image_size": 32, "patch_size": 8},
        True,
        0,
    ),
    "siglip": ("SiglipConfig", TOWERS, False, 0),
    "siglip2": (
        "Siglip2Config",
        {"vision_config": {**SMALL, "num_patches": 16, "patch_size": 8}, "text_config": SMALL},
        False,
        0,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """Write a family's tiny random model, once; return its folder. Skips where it is too new."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        kind, settings, *_ = FAMILIES[family]
        if not hasattr(transformers, kind):
            pytest.skip(f"transformers {transformers.__version__} has no {kind}")
        if not (root / family).exists():
            torch.manual_seed(0)
            model = AutoModel.from_config(getattr(transformers, kind)(**settings))
            for parameter in model.parameters():  # zeros, as of [CLS] tokens, would hide mistakes
                nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(root / family)
        return root / family

    return folder


def size_of(family: str) -> tuple[int, int]:
    return (64, 64) if family.startswith("swin") else (32, 32)


def called_plainly(family: str, folder: Path, pixels: Tensor) -> Tensor:
    """The model's last hidden state as its own documentation calls it."""
    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model) if family != "clip_vision" else model
    if family != "siglip2":
        return model(pixels).last_hidden_state
    rows, columns = (side // 8 for side in pixels.shape[-2:])
    cut = [
        pixels[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].permute(0, 2, 3, 1).flatten(1)
        for r in range(rows)
        for c in range(columns)
    ]
    shapes = torch.tensor([[rows, columns]] * len(pixels))
    mask = torch.ones(len(pixels), len(cut), dtype=torch.long)
    return model(torch.stack(cut, 1), mask, shapes).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_the_model_called_plainly(saved, family):
    _, _, has_cls, registers = FAMILIES[family]
    folder, size = saved(family), size_of(family)
    encoder = build_image_encoder(str(folder), 32, size).eval()
    assert (encoder.grid, encoder.has_cls) == ((4, 4), has_cls)
    assert (encoder.layout.registers, encoder.num_patches, encoder.width) == (registers, 16, 32)
    pixels = torch.rand(3, 3, *size)
    expected = called_plainly(family, folder, pixels)
    assert expected.shape == (3, has_cls + registers + 16, 32)
    tokens = encoder(pixels)
    torch.testing.assert_close(tokens.local, expected[:, has_cls + registers :])
    if has_cls:
        torch.testing.assert_close(tokens.cls, expected[:, :1])
    else:
        assert tokens.cls is None
    encoder.gives_cls = False
    alone = encoder(pixels)
    assert alone.cls is None
    assert torch.equal(alone.local, tokens.local)
    assert not encoder.has_cls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rectangle_of_another_resolution_has_its_own_grid(saved, family):
    if family.startswith("clip") and not clip_interpolates():
        pytest.skip(f"CLIP of transformers {transformers.__version__} has one resolution")
    size = (96, 64) if family.startswith("swin") else (48, 32)
    encoder = build_image_encoder(str(saved(family)), 24, size).eval()
    assert encoder.grid == (6, 4)
    with torch.no_grad():
        tokens = encoder(torch.rand(2, 3, *size))
    assert tokens.local.shape == (2, 24, 24)
    assert tokens.local.isfinite().all()


def clip_interpolates() -> bool:
    forward = inspect.signature(transformers.CLIPVisionModel.forward)
    return "interpolate_pos_encoding" in forward.parameters


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "siglip2", "swin"])
def test_patches_are_numbered_row_by_row(saved, family):
    """A change of one patch's pixels changes the token at row * columns + column the most."""
    size = (128, 64) if family == "swin" else (48, 32)
    encoder = build_image_encoder(str(saved(family)), 32, size).eval()
    rows, columns = encoder.grid
    assert rows > columns
    high, wide = size[0] // rows, size[1] // columns
    pixels = torch.rand(1, 3, *size)
    other = pixels.clone()
    other[:, :, 4 * high : 5 * high, 2 * wide : 3 * wide] += 3
    with torch.no_grad():
        change = (encoder(other).local - encoder(pixels).local).norm(dim=2)[0]
    assert change.argmax() == 4 * columns + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_asks_for_gradient_gets_it(saved, family):
    encoder = build_image_encoder(str(saved(family)), 24, size_of(family))
    tokens = encoder(torch.rand(2, 3, *size_of(family)))
    loss = tokens.local.square().sum() + (0 if tokens.cls is None else tokens.cls.square().sum())
    loss.backward()
    asking = {name for name, p in encoder.named_parameters() if p.requires_grad}
    without = {name for name in asking if encoder.get_parameter(name).grad is None}
    assert without == set()
    assert len(asking) > 10


def test_parameters_of_a_pooler_ask_for_none(saved):
    encoder = build_image_encoder(str(saved("clip")), 32, 32)
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert {name.split(".")[-2] for name in frozen} == {"post_layernorm"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_checkpoint_s_config_rebuilds_the_encoder(saved, family):
    folder, size = saved(family), size_of(family)
    encoder = build_image_encoder(str(folder), 24, size).eval()
    kept = json.loads(json.dumps(encoder.config()))
    again = build_image_encoder("nowhere", 24, size, config=kept).eval()
    again.load_state_dict(encoder.state_dict())
    assert (again.layout, again.preprocessing) == (encoder.layout, encoder.preprocessing)
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    assert torch.equal(again(pixels).local, encoder(pixels).local)


def test_a_convolutional_map_is_a_grid_too(tmp_path):
    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(tmp_path)
    encoder = build_image_encoder(str(tmp_path), 24, (64, 96)).eval()
    assert (encoder.grid, encoder.has_cls, encoder.width) == ((8, 12), False, 16)
    assert encoder(torch.rand(2, 3, 64, 96)).local.shape == (2, 96, 24)


# --- timm --------------------------------------------------------------------------------------

TIMM = {  # name: grid, [CLS], registers, width at 64 x 32
    "vit_tiny_patch16_224": ((4, 2), True, 0, 192),
    "deit_tiny_distilled_patch16_224": ((4, 2), True, 1, 192),
    "vit_small_patch14_reg4_dinov2": ((4, 2), True, 4, 384),
    "resnet10t": ((2, 1), False, 0, 512),
}


@pytest.fixture
def untrained_timm(monkeypatch):
    """timm without its hub: what asks for pretrained weights gets random ones."""
    timm = pytest.importorskip("timm", reason="timm is an extra")
    create = timm.create_model

    def random(name: str, pretrained: bool, **options):
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", random)
    return timm


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_models_have_their_layout_and_survive_a_checkpoint(name, untrained_timm):
    grid, has_cls, registers, width = TIMM[name]
    size = (56, 28) if "patch14" in name else (64, 32)
    encoder = build_image_encoder(f"timm/{name}", 24, size).eval()
    layout = encoder.layout
    assert (layout.grid, layout.has_cls) == (grid, has_cls)
    assert (layout.registers, layout.width) == (registers, width)
    pixels = torch.rand(2, 3, *size)
    plain = encoder.backbone.model.forward_features(pixels)
    expected = plain.flatten(2).mT if plain.ndim == 4 else plain[:, int(has_cls) + registers :]
    torch.testing.assert_close(encoder(pixels).local, encoder.proj(expected))
    kept = json.loads(json.dumps(encoder.config()))
    again = build_image_encoder("nowhere", 24, size, config=kept).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(pixels).local, encoder(pixels).local)
    assert again.preprocessing == encoder.preprocessing


def test_timm_tells_its_preprocessing_and_what_it_does_not_know(untrained_timm):
    name = "timm/vit_tiny_patch16_224"  # its weights were trained on pixels in [-1, 1]
    assert build_image_encoder(name, 24, 32).preprocessing.mean == (0.5, 0.5, 0.5)
    assert build_image_encoder(name, 24, 32, image_norm="imagenet").preprocessing == Preprocessing()
    with pytest.raises(InputError, match="--vit_type timm/nothing: timm can't build it"):
        build_image_encoder("timm/nothing", 24, 32)


def test_missing_timm_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="needs timm, which is not installed: pip install timm"):
        build_image_encoder("timm/vit_tiny_patch16_224", 24, 32)


# --- preprocessing -----------------------------------------------------------------------------


def with_processor(folder: Path, target: Path, **values) -> Path:
    """A copy of a model's folder with a preprocessor_config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / "preprocessor_config.json").write_text(json.dumps(values))
    return target


def test_an_encoder_brings_its_own_mean_std_and_filter(saved, tmp_path):
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    own = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    dino = with_processor(saved("dinov2"), tmp_path / "dino", **values)
    vit = with_processor(saved("vit"), tmp_path / "vit", **values)

    def chosen(folder: Path, image_norm: str | None) -> Preprocessing:
        return build_image_encoder(str(folder), 32, 32, image_norm=image_norm).preprocessing

    assert chosen(dino, None) == chosen(dino, "model") == chosen(vit, "model") == own
    assert chosen(vit, None) == chosen(dino, "imagenet") == Preprocessing()
    assert chosen(saved("clip"), None).mean == CLIP_MEAN
    with pytest.raises(InputError, match=r"--image_norm model: .* no preprocessor_config.json"):
        chosen(saved("vit"), "model")


def test_pixels_are_normalised_with_them(saved, tmp_path):
    values = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.25]}
    folder = with_processor(saved("siglip"), tmp_path / "siglip", **values)
    encoder = build_image_encoder(str(folder), 32, 32)
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert encoder.normalise(pixels)[0, :, 0, 0].tolist() == [1.0, 1.5, 3.5]
    assert encoder.normalise(pixels.float()).max() == 255


# --- refusals ----------------------------------------------------------------------------------


def test_a_size_that_does_not_suit_is_refused_by_its_flag(saved):
    with pytest.raises(InputError, match="--img_res 4x32 does not suit"):
        build_image_encoder(str(saved("vit")), 32, (4, 32))


def test_tokens_that_are_no_grid_are_refused():
    class Strange(nn.Module):
        config = transformers.ViTConfig(image_size=32, patch_size=8)

        def forward(self, pixels):
            output = nn.Linear(3, 3)(pixels.new_zeros(1, 5, 3))
            return transformers.modeling_outputs.BaseModelOutput(output)

    with pytest.raises(InputError, match="5 tokens of Strange are no grid of 4 x 4 patches"):
        ImageEncoder(Strange(), 32, 32)


def test_offline_is_named_as_the_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at its import
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        build_image_encoder("nobody/nothing-here", 32, 32)


# --- a real one --------------------------------------------------------------------------------

REAL = Path(__file__).parents[3] / "shared" / "photos" / "vit_s14"


@pytest.mark.skipif(not REAL.is_dir(), reason="no pretrained ViT-S/14 beside the checkout")
@torch.no_grad()
def test_a_pretrained_vit_s14_is_read_with_its_own_preprocessing():
    encoder = build_image_encoder(str(REAL), 384, 224).eval()
    assert (encoder.grid, encoder.has_cls, encoder.layout.registers) == ((16, 16), True, 0)
    pixels = torch.rand(1, 3, 224, 224)
    plain = AutoModel.from_pretrained(REAL).float().eval()(pixels).last_hidden_state
    tokens = encoder(pixels)
    torch.testing.assert_close(torch.cat([tokens.cls, tokens.local], 1), plain)
    assert plain.std() > 0.5  # a network that was trained, not noise
