"""Image and text encoders: pixels or word ids -> projected `Tokens`, whatever the backbone."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib.batch import Tokens, image_size, length_mask
from lib.errors import InputError, InputWarning
from lib.memory import check_fits
from lib.model.backbones import (
    freeze_unreached,
    hub_id,
    load_backbone,
    saved_config,
    tiny_image_config,
    tiny_text_config,
)
from lib.model.chunks import BackboneEncoder
from lib.model.gru import GRUTextEncoder
from lib.model.image_backbones import image_tokens, token_layout
from lib.model.lora import add_lora
from lib.model.preprocessing import Preprocessing, choose_preprocessing
from lib.model.product import Linear, with_compiled_linears
from lib.model.sentence import SentenceEncoder
from lib.model.text_backbones import most_positions, text_hidden
from lib.model.timm_backbones import PREFIX, TimmConfig, build_timm, timm_preprocessing


def _projection(width: int, embed_size: int) -> nn.Module:
    if width == embed_size:
        return nn.Identity()
    check_fits({f"--embed_size {embed_size}": 4.0 * width * embed_size}, "the projection")
    return Linear(width, embed_size)


Encoder = TypeVar("Encoder", bound=BackboneEncoder)


class ImageEncoder(BackboneEncoder):
    """Any image backbone, then a projection to the joint space.

    pixels (B, 3, H, W) -> Tokens(local (B, L, C), cls (B, 1, C) or None), patches row by row in a
    `grid` of (rows, columns). uint8 pixels are scaled and normalised here, on the device, with what
    `preprocessing` says; float pixels are taken as normalised already, and (B, T, width) as the
    backbone's last hidden state, computed before. `layout` tells what the
    backbone's output holds; its registers are never handed on. `img_res` is a side in pixels, or
    (height, width). Raises InputError where it does not suit the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed_size: int,
        img_res: int | tuple[int, int],
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.backbone = with_compiled_linears(backbone)
        self.img_res = image_size(img_res)
        self.preprocessing = preprocessing or Preprocessing()
        self.layout = token_layout(backbone, self.img_res)
        self.width = self.layout.width
        self.proj = _projection(self.width, embed_size)
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)
        self.frozen = False
        self.gives_cls = True

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return self.layout.grid

    @property
    def num_patches(self) -> int:
        """L, the number of patches."""
        return self.layout.num_patches

    @property
    def has_cls(self) -> bool:
        """Whether the tokens have a [CLS]: where the backbone has one, and `gives_cls`."""
        return self.layout.has_cls and self.gives_cls

    def config(self) -> dict:
        """Return what `EncoderSource.image_config` rebuilds the encoder from, JSON-able."""
        return {**plain_config(self.backbone), PREPROCESSING: self.preprocessing.plain()}

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return float pixels with the encoder's mean and std; float input passes unchanged."""
        if pixels.dtype != torch.uint8:
            return pixels
        return (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std

    def hidden(self, pixels: Tensor) -> Tensor:
        """Return the backbone's last hidden state, (B, [CLS] + registers + L, width)."""
        if pixels.ndim == 3:
            return pixels.to(self.mean.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return image_tokens(self.backbone, self.normalise(pixels))

    def digest(self) -> str:
        """Return a hash of all that the hidden state of an image file depends on, 32 hex digits."""
        facts = json.dumps([self.config(), self.img_res], sort_keys=True)
        found = hashlib.blake2b(facts.encode(), digest_size=16)
        for name, value in sorted(self.backbone.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def _read(self, pixels: Tensor) -> Tensor:
        """Return the hidden state without registers, (B, [1+] L, width)."""
        hidden = self.hidden(pixels)
        if self.layout.first_patch != int(self.has_cls):
            patches = hidden[:, self.layout.first_patch :]
            hidden = torch.cat([hidden[:, : int(self.has_cls)], patches], 1)
        return hidden

    def forward(self, pixels: Tensor) -> Tokens:
        features = self.projected(self._read, pixels)  # (B, [1+] L, C)
        cls = features[:, :1] if self.has_cls else None
        patches = features[:, int(self.has_cls) :]  # (B, L, C)
        return Tokens(patches, patches.new_ones(patches.shape[:2], dtype=torch.bool), cls)


class TextEncoder(BackboneEncoder):
    """Any text backbone, then a projection to the joint space.

    ids (B, M), lengths (B,) -> Tokens(local (B, M, C)); padding words are zero-masked out of the
    attention, and their features mean nothing: the mask says which are real. `pad_id` is the
    tokenizer's padding, which some families' attention reads. With `reads_padding`, for a method
    that does, padding has the features that the backbone gives it.
    """

    reads_padding: bool = False

    def __init__(self, backbone: nn.Module, embed_size: int, pad_id: int = 0) -> None:
        super().__init__()
        self.backbone = with_compiled_linears(backbone)
        self.pad_id = pad_id
        self.width = backbone.config.hidden_size
        self.max_positions = most_positions(backbone)
        unread = next(backbone.parameters()).new_ones(1, 2, dtype=torch.long)
        freeze_unreached(backbone, text_hidden(backbone, unread, unread > 0, pad_id))
        self.frozen = False
        self.proj = _projection(self.width, embed_size)
        self.sentence: SentenceEncoder | None = None

    def keep_sentences(self) -> None:
        """Hand out a `Tokens.sentence` too: what the backbone as it is now says of a whole text."""
        self.sentence = SentenceEncoder(self.backbone, self.pad_id)

    def config(self) -> dict:
        """Return what `EncoderSource.text_config` rebuilds the encoder from, JSON-able."""
        return plain_config(self.backbone)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the backbone's last hidden state, (B, M, width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return text_hidden(self.backbone, ids, mask, self.pad_id, self.reads_padding)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tokens:
        mask = length_mask(lengths, ids.shape[1])
        sentence = None if self.sentence is None else self.sentence(ids, mask)
        return Tokens(self.projected(self.hidden, ids, mask), mask, sentence=sentence)


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


def image_filter(encoder: nn.Module | None) -> str:
    """Return the filter that images of `encoder` are resized with; None and regions read none."""
    return encoder.preprocessing.resample if isinstance(encoder, ImageEncoder) else "bicubic"


ROUNDED_UP = 128  # tables are made a multiple of 8, 64 or 128 rows long
PREPROCESSING = "preprocessing"  # key beside the backbone's own config in a checkpoint


def plain_config(backbone: nn.Module) -> dict:
    """Return a backbone's config as JSON-able values."""
    return json.loads(backbone.config.to_json_string(use_diff=False))


def build_image_encoder(
    vit_type: str,
    embed_size: int,
    img_res: int | tuple[int, int],
    config: dict | None = None,
    tiny: tuple[int, int, int] = (64, 2, 16),
    image_norm: str | None = None,
) -> ImageEncoder:
    """Return the image encoder for `--vit_type`; `config` (a saved one) asks for random weights.

    `tiny` is (width, layers, patch size) of the encoder trained from scratch; `image_norm` as
    `choose_preprocessing` takes it.
    """
    source: Any  # a config, or where one lies
    backbone: nn.Module
    preprocessing, folder = None, None
    if config is not None:
        values = dict(config)
        saved = values.pop(PREPROCESSING, None)
        preprocessing = saved and Preprocessing.from_plain(saved)
        source = saved_config(values)
    elif vit_type.startswith(PREFIX):
        size = list(image_size(img_res))
        source = TimmConfig(architecture=vit_type.removeprefix(PREFIX), image_size=size)
    elif vit_type == "tiny":
        source = tiny_image_config(image_size(img_res), *tiny)
    else:
        source = folder = hub_id(vit_type)
    if isinstance(source, TimmConfig):
        backbone = build_timm(source, pretrained=config is None)
        own = image_norm != "imagenet"
        preprocessing = preprocessing or (timm_preprocessing(backbone) if own else Preprocessing())
    else:
        backbone = load_backbone(source, "--vit_type")
    if preprocessing is None:
        preprocessing = choose_preprocessing(image_norm, backbone.config, folder)
    return ImageEncoder(backbone, embed_size, img_res, preprocessing)


def warn_of_small_vocabulary(words: int, rows: int, source: str) -> None:
    """Warn where a vocabulary has fewer words than the encoder's table has rows.

    Not for the few rows that round a table's size up.
    """
    if rows - words > ROUNDED_UP:
        warnings.warn(
            f"{source}: the vocabulary has {words} words, the encoder {rows}; with a vocabulary "
            "that is not the encoder's own, its words mean nothing",
            InputWarning,
            stacklevel=2,
        )


def build_text_encoder(
    bert_path: str,
    embed_size: int,
    vocab_size: int,
    max_word: int,
    config: dict | None = None,
    tiny: tuple[int, int] = (64, 2),
    pad_id: int = 0,
    positions: int = 0,
) -> TextEncoder:
    """Return the text encoder for `--bert_path`; `config` (a saved one) asks for random weights.

    One made from scratch has at least so many `positions`.
    Raises InputError where `max_word` exceeds the positions or the vocabularies disagree.
    """
    source: Any  # a config, or where one lies
    if config is not None:
        source = saved_config(config)
    elif bert_path == "tiny":
        source = tiny_text_config(vocab_size, *tiny, positions=max(max_word, positions))
    else:
        source = hub_id(bert_path)
    encoder = TextEncoder(load_backbone(source, "--bert_path"), embed_size, pad_id)
    if vocab_size > encoder.backbone.config.vocab_size:
        raise InputError(
            f"--bert_path {bert_path}: the vocabulary has {vocab_size} words, "
            f"the encoder {encoder.backbone.config.vocab_size}"
        )
    if isinstance(source, str):
        rows = encoder.backbone.config.vocab_size
        warn_of_small_vocabulary(vocab_size, rows, f"--bert_path {bert_path}")
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
    images come as precomputed regions of so many channels; `gru`, its (word_dim, dropout), that a
    GRU reads the captions.
    """

    vit_type: str
    bert_path: str
    embed_size: int
    img_res: int | tuple[int, int]
    vocab_size: int
    max_word: int  # what the text encoder must read
    positions: int = 0  # what a text encoder from scratch is made to read, if more
    tiny_width: int = 64
    tiny_layers: int = 2
    tiny_patch_size: int = 16
    image_config: dict | None = None
    text_config: dict | None = None
    region_dim: int | None = None
    image_norm: str | None = None
    image_cls: bool = True
    gru: tuple[int, float] | None = None
    pad_id: int = 0  # of the tokenizer
    freeze: str = "none"  # image, text, both or none
    lora_rank: int = 0

    def image(self) -> ImageEncoder | RegionEncoder:
        """Return a new image encoder. Raises InputError as `load_backbone` does."""
        if self.region_dim is not None:
            return RegionEncoder(self.region_dim, self.embed_size)
        tiny = (self.tiny_width, self.tiny_layers, self.tiny_patch_size)
        encoder = build_image_encoder(
            self.vit_type, self.embed_size, self.img_res, self.image_config, tiny, self.image_norm
        )
        encoder.gives_cls = self.image_cls
        return self._as_asked(encoder, "image")

    def text(self) -> TextEncoder | GRUTextEncoder:
        """Return a new text encoder. Raises InputError as `load_backbone` does."""
        if self.gru is not None:
            return GRUTextEncoder(self.vocab_size, self.embed_size, *self.gru)
        encoder = build_text_encoder(
            self.bert_path,
            self.embed_size,
            self.vocab_size,
            self.max_word,
            self.text_config,
            (self.tiny_width, self.tiny_layers),
            self.pad_id,
            self.positions,
        )
        return self._as_asked(encoder, "text")

    def _as_asked(self, encoder: Encoder, side: str) -> Encoder:
        if self.freeze in (side, "both"):
            encoder.freeze()
        elif self.lora_rank:
            add_lora(encoder.backbone, self.lora_rank)
        return encoder


def frozen_states(
    encoder: ImageEncoder, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> Callable[[Tensor], Tensor]:
    """Return what takes pixels (B, 3, H, W) to `encoder.hidden` of them, float32, in evaluation."""

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        training = encoder.training
        encoder.eval()
        with autocast():
            hidden = encoder.hidden(pixels.to(device)).float()
        encoder.train(training)
        return hidden

    return encode
