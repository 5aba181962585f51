"""Image encoders of timm behind transformers' interface: `--vit_type timm/NAME`, an extra."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lib.errors import InputError
from lib.model.preprocessing import Preprocessing

PREFIX = "timm/"


class TimmConfig:
    """What rebuilds a timm model without a hub: its name, and the image size it is built for.

    Checkpoints of before hold `others`, which every config of transformers has, and timm none.
    """

    model_type = "timm_features"

    def __init__(self, architecture: str = "", image_size: Any = None, **others: Any) -> None:
        self.architecture = architecture
        self.image_size = image_size

    def to_json_string(self, use_diff: bool = False) -> str:
        """Return all of it, under the name that the configs of transformers have for that."""
        return json.dumps({"model_type": self.model_type, **vars(self)})


class TimmBackbone(nn.Module):
    """A timm model without its head: pixels (B, 3, H, W) -> `.last_hidden_state`.

    Transformers give tokens (B, N, width), convolutional networks a map (B, width, rows, columns).
    """

    def __init__(self, model: nn.Module, config: TimmConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        hidden = self.model.forward_features(pixels)
        if hidden.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            hidden = hidden.permute(0, 3, 1, 2)  # (B, width, rows, columns)
        return SimpleNamespace(last_hidden_state=hidden)

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the patches of (height, width) images."""
        rows, columns = self.model.patch_embed.dynamic_feat_size(size)
        return rows, columns

    def gradient_checkpointing_enable(self, _: dict | None = None) -> None:
        """Let the blocks keep nothing but their inputs for the backward pass."""
        self.model.set_grad_checkpointing(True)


def build_timm(config: TimmConfig, pretrained: bool) -> TimmBackbone:
    """Return the model, its position embeddings resampled to the config's size where it has any.

    Raises InputError where timm is not installed, does not know the name, or can't get the weights.
    """
    timm = _timm()
    options = {"pretrained": pretrained, "num_classes": 0}
    try:
        try:
            model = timm.create_model(
                config.architecture, img_size=tuple(config.image_size), **options
            )
        except TypeError:  # a convolutional network takes any size, and no such argument
            model = timm.create_model(config.architecture, **options)
    except Exception as error:  # timm raises whatever its hub client does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--vit_type {PREFIX}{config.architecture}: timm can't build it ({reason:.160})"
        ) from None
    return TimmBackbone(model.float(), config)


def timm_preprocessing(backbone: TimmBackbone) -> Preprocessing:
    """Return the mean, standard deviation and filter that the weights were trained with."""
    values = _timm().data.resolve_data_config({}, model=backbone.model)
    resample = "bilinear" if values["interpolation"] == "bilinear" else "bicubic"
    return Preprocessing(tuple(values["mean"]), tuple(values["std"]), resample)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError(
            "--vit_type timm/NAME needs timm, which is not installed: pip install timm"
        ) from None
    return timm
