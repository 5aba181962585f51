"""ViT, Swin and BERT from transformers: pixels or word ids -> projected `Tokens`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    PretrainedConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from lib.batch import Tokens, length_mask
from lib.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HUB_IDS = {
    "vit": "google/vit-base-patch16-224-in21k",
    "vit_224": "google/vit-base-patch16-224-in21k",
    "vit_384": "google/vit-base-patch16-384",
    "swin": "microsoft/swin-base-patch4-window7-224",
    "swin_224": "microsoft/swin-base-patch4-window7-224",
    "swin_384": "microsoft/swin-base-patch4-window12-384",
}
HUB_OWNERS = {"vit-": "google/", "swin-": "microsoft/"}  # owners of names given without one
BACKBONES = {"vit": ViTModel, "swin": SwinModel, "bert": BertModel}


def hub_id(name: str) -> str:
    """Return the hub id or folder that `--vit_type`/`--bert_path` stands for."""
    if name in HUB_IDS:
        return HUB_IDS[name]
    if "/" not in name and not os.path.isdir(name):
        for prefix, owner in HUB_OWNERS.items():
            if name.startswith(prefix):
                return owner + name
    return name


def tiny_image_config(img_res: int, width: int, layers: int, patch_size: int) -> ViTConfig:
    """Return the ViT that `--vit_type tiny` trains from scratch."""
    return ViTConfig(
        image_size=img_res,
        patch_size=patch_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 16),
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def tiny_text_config(vocab_size: int, width: int, layers: int, positions: int) -> BertConfig:
    """Return the BERT that `--bert_path tiny` trains from scratch."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 16),
        intermediate_size=4 * width,
        max_position_embeddings=max(64, positions),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def load_backbone(source: str | PretrainedConfig, flag: str) -> nn.Module:
    """Return the backbone in float32 without its pooling layer.

    `source` is a hub id, a local folder, or a config, which gives random weights. Raises InputError
    where it can't be found, is of an unsupported kind, or where the file's weights leave a part of
    the network uninitialised.
    """
    config = source if isinstance(source, PretrainedConfig) else _load_config(source, flag)
    kind = BACKBONES.get(config.model_type)
    if kind is None:
        raise InputError(
            f"{flag} {source}: model type {config.model_type!r} is not supported; "
            f"choose one of {', '.join(BACKBONES)}"
        )
    if isinstance(source, PretrainedConfig):
        try:
            return kind(config, add_pooling_layer=False).float()
        except ValueError as error:
            raise InputError(f"{flag}: no such network can be built ({_first(error)})") from None
    try:
        model, report = kind.from_pretrained(
            source,
            add_pooling_layer=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{flag} {source}: no weights could be loaded ({_first(error)})") from None
    missing = [key for key in report["missing_keys"] if "position_ids" not in key]
    mismatched = [str(key) for key in report.get("mismatched_keys", [])]
    if missing or mismatched:
        raise InputError(
            f"{flag} {source}: the file lacks or has other shapes for "
            f"{len(missing) + len(mismatched)} weights, the first {(*missing, *mismatched)[0]}"
        )
    return model.float()


def _load_config(source: str, flag: str) -> PretrainedConfig:
    if os.path.sep in source and source[0] in "./~" and not Path(source).is_dir():
        raise InputError(f"{flag} {source}: no such folder")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{flag} {source}: neither a folder with a config.json nor a model that the hub "
            f"hands out here; give a local folder, or tiny ({_first(error)})"
        ) from None


def _first(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _projection(width: int, embed_size: int) -> nn.Module:
    return nn.Identity() if width == embed_size else nn.Linear(width, embed_size)


class ImageEncoder(nn.Module):
    """ViT or Swin, then a projection to the joint space.

    pixels (B, 3, R, R) -> Tokens(local (B, L, C), cls (B, 1, C) or None). uint8 pixels are scaled
    and normalised with ImageNet's statistics here, on the device; float pixels are taken as
    normalised already. `num_patches` (L) and `has_cls` are read off the backbone's own output.
    """

    def __init__(self, backbone: nn.Module, embed_size: int, img_res: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.img_res = img_res
        self.width = _output_width(backbone)
        self.has_cls = backbone.config.model_type == "vit"
        self.proj = _projection(self.width, embed_size)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.num_patches = self._count_patches()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return float pixels with ImageNet's mean and std; float input passes unchanged."""
        if pixels.dtype != torch.uint8:
            return pixels
        return (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std

    def hidden(self, pixels: Tensor) -> Tensor:
        """Return the backbone's last hidden state, (B, [1+] L, width)."""
        pixels = self.normalise(pixels)
        if self.has_cls and pixels.shape[-1] != self.backbone.config.image_size:
            return self.backbone(pixels, interpolate_pos_encoding=True).last_hidden_state
        return self.backbone(pixels).last_hidden_state

    def forward(self, pixels: Tensor) -> Tokens:
        features = self.proj(self.hidden(pixels))  # (B, [1+] L, C)
        cls = features[:, :1] if self.has_cls else None
        patches = features[:, 1:] if self.has_cls else features  # (B, L, C)
        return Tokens(patches, patches.new_ones(patches.shape[:2], dtype=torch.bool), cls)

    def _count_patches(self) -> int:
        training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            probe = torch.zeros(1, 3, self.img_res, self.img_res)
            try:
                length = self.hidden(probe).shape[1]
            except (ValueError, RuntimeError) as error:
                raise InputError(
                    f"--img_res {self.img_res} does not suit this image encoder ({_first(error)})"
                ) from None
        self.backbone.train(training)
        return length - int(self.has_cls)


class TextEncoder(nn.Module):
    """BERT, then a projection to the joint space.

    ids (B, M), lengths (B,) -> Tokens(local (B, M, C)); padding words are zero-masked out of the
    attention, and their features are whatever BERT gives: the mask says which are real.
    """

    def __init__(self, backbone: nn.Module, embed_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = backbone.config.hidden_size
        self.max_positions = backbone.config.max_position_embeddings
        self.proj = _projection(self.width, embed_size)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return BERT's last hidden state, (B, M, width)."""
        return self.backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def forward(self, ids: Tensor, lengths: Tensor) -> Tokens:
        mask = length_mask(lengths, ids.shape[1])
        return Tokens(self.proj(self.hidden(ids, mask)), mask)


class RegionEncoder(nn.Module):
    """Precomputed region features, projected to the joint space.

    regions (B, N, F), lengths (B,) of the real ones (None: all) -> Tokens(local (B, N, C)), without
    a [CLS]. What stands behind a row's length is masked, and never read. Raises InputError where
    the features have other than F channels.
    """

    has_cls = False

    def __init__(self, region_dim: int, embed_size: int) -> None:
        super().__init__()
        self.width = region_dim
        self.proj = nn.Linear(region_dim, embed_size)

    def forward(self, regions: Tensor, lengths: Tensor | None = None) -> Tokens:
        if regions.shape[-1] != self.width:
            raise InputError(
                f"--region_dim {self.width}: the region features have {regions.shape[-1]} "
                "channels; give that number"
            )
        if lengths is None:
            mask = regions.new_ones(regions.shape[:2], dtype=torch.bool)
        else:
            mask = length_mask(lengths, regions.shape[1])
        return Tokens(self.proj(regions), mask)


def _output_width(backbone: nn.Module) -> int:
    config = backbone.config
    if config.model_type == "swin":
        return int(config.embed_dim * 2 ** (len(config.depths) - 1))
    return config.hidden_size


def build_image_encoder(
    vit_type: str,
    embed_size: int,
    img_res: int,
    config: dict | None = None,
    tiny: tuple[int, int, int] = (64, 2, 16),
) -> ImageEncoder:
    """Return the image encoder for `--vit_type`; `config` (a saved one) asks for random weights.

    `tiny` is (width, layers, patch size) of the encoder trained from scratch.
    """
    if config is not None:
        source = AutoConfig.for_model(**config)
    elif vit_type == "tiny":
        source = tiny_image_config(img_res, *tiny)
    else:
        source = hub_id(vit_type)
    return ImageEncoder(load_backbone(source, "--vit_type"), embed_size, img_res)


def build_text_encoder(
    bert_path: str,
    embed_size: int,
    vocab_size: int,
    max_word: int,
    config: dict | None = None,
    tiny: tuple[int, int] = (64, 2),
) -> TextEncoder:
    """Return the text encoder for `--bert_path`; `config` (a saved one) asks for random weights.

    Raises InputError where `max_word` exceeds BERT's positions or the vocabularies disagree.
    """
    if config is not None:
        source = AutoConfig.for_model(**config)
    elif bert_path == "tiny":
        source = tiny_text_config(vocab_size, *tiny, positions=max_word)
    else:
        source = hub_id(bert_path)
    encoder = TextEncoder(load_backbone(source, "--bert_path"), embed_size)
    if vocab_size > encoder.backbone.config.vocab_size:
        raise InputError(
            f"--bert_path {bert_path}: the vocabulary has {vocab_size} words, "
            f"the encoder {encoder.backbone.config.vocab_size}"
        )
    if max_word > encoder.max_positions:
        raise InputError(
            f"--max_word {max_word} is more than the {encoder.max_positions} positions "
            f"of --bert_path {bert_path}"
        )
    return encoder


@dataclass(frozen=True)
class EncoderSource:
    """Everything that building a method's encoders needs, read off the arguments once.

    `image_config`/`text_config` are config dictionaries of a checkpoint: with them nothing is
    looked up, and the weights stay random until the checkpoint's are loaded. `region_dim` says that
    images come as precomputed regions of so many channels.
    """

    vit_type: str
    bert_path: str
    embed_size: int
    img_res: int
    vocab_size: int
    max_word: int
    tiny_width: int = 64
    tiny_layers: int = 2
    tiny_patch_size: int = 16
    image_config: dict | None = None
    text_config: dict | None = None
    region_dim: int | None = None

    def image(self) -> ImageEncoder | RegionEncoder:
        """Return a new image encoder. Raises InputError as `load_backbone` does."""
        if self.region_dim is not None:
            return RegionEncoder(self.region_dim, self.embed_size)
        tiny = (self.tiny_width, self.tiny_layers, self.tiny_patch_size)
        return build_image_encoder(
            self.vit_type, self.embed_size, self.img_res, self.image_config, tiny
        )

    def text(self) -> TextEncoder:
        """Return a new text encoder. Raises InputError as `load_backbone` does."""
        return build_text_encoder(
            self.bert_path,
            self.embed_size,
            self.vocab_size,
            self.max_word,
            self.text_config,
            (self.tiny_width, self.tiny_layers),
        )
