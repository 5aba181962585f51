"""Names, folders and configs -> pretrained or untrained transformers backbones, both sides.

transformers takes seconds to import, so it is imported where a backbone is built, not here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lib.errors import InputError, as_input_error, first_line
from lib.files import check_folder, load_object
from lib.memory import check_fits, transformer_bytes
from lib.model.timm_backbones import TimmConfig

if TYPE_CHECKING:
    from transformers import BertConfig, PretrainedConfig, PreTrainedModel, ViTConfig

HUB_IDS = {
    "vit": "google/vit-base-patch16-224-in21k",
    "vit_224": "google/vit-base-patch16-224-in21k",
    "vit_384": "google/vit-base-patch16-384",
    "swin": "microsoft/swin-base-patch4-window7-224",
    "swin_224": "microsoft/swin-base-patch4-window7-224",
    "swin_384": "microsoft/swin-base-patch4-window12-384",
}
HUB_OWNERS = {"vit-": "google/", "swin-": "microsoft/"}  # owners of names given without one
# towers that AutoModel does not know
TOWERS = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}
INPUTS = {"--vit_type": "pixel_values", "--bert_path": "input_ids"}  # what each side must read
KNOWN = {  # named in messages; others work where their outputs say enough
    "--vit_type": "vit, deit, beit, dinov2, dinov2_with_registers, dinov3_vit, swin, swinv2, clip, "
    "siglip, siglip2, or timm/NAME",
    "--bert_path": "bert, mpnet, roberta, deberta-v2, modernbert, clip, siglip, siglip2",
}
NO_CONFIG_IN_FOLDER = "its config.json is not that of a transformers model"
NO_CONFIG_ANYWHERE = (
    "neither a folder with a config.json nor a model that the hub hands out here; give a local "
    "folder, or tiny"
)


def hub_id(name: str) -> str:
    """Return the hub id or folder that `--vit_type`/`--bert_path` stands for."""
    if name in HUB_IDS:
        return HUB_IDS[name]
    if "/" not in name and not os.path.isdir(name):
        for prefix, owner in HUB_OWNERS.items():
            if name.startswith(prefix):
                return owner + name
    return name


def tiny_image_config(size: tuple[int, int], width: int, layers: int, patch_size: int) -> ViTConfig:
    """Return the ViT that `--vit_type tiny` trains from scratch."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=size[0] if size[0] == size[1] else list(size),
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
    from transformers import BertConfig

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


def saved_config(config: dict) -> PretrainedConfig | TimmConfig:
    """Return the config that a checkpoint keeps as a dictionary."""
    import transformers

    values = dict(config)
    kind = values.pop("model_type")
    if kind == TimmConfig.model_type:
        return TimmConfig(**values)
    if hasattr(transformers, TOWERS.get(kind, "")):  # which AutoConfig of 4.x does not know either
        return getattr(transformers, TOWERS[kind]).config_class(**values)
    return transformers.AutoConfig.for_model(kind, **values)


def load_config(source: str, flag: str) -> PretrainedConfig:
    """Return the config in a folder or of a hub id, of one tower where there are two.

    Raises InputError where there is none, or where HF_HUB_OFFLINE keeps the hub away.
    """
    from transformers import AutoConfig

    local = os.path.exists(source) or (os.path.sep in source and source[0] in "./~")
    if local:
        check_folder(source, flag, weights=True)
        load_object(Path(source) / "config.json", f"{flag} names a folder with a model's config")
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers lets whatever a strange config provokes through
        told = NO_CONFIG_IN_FOLDER if local else NO_CONFIG_ANYWHERE
        raise InputError(f"{flag} {source}: {told} ({unreachable(error)})") from None
    return tower(config, flag)


def tower(config: PretrainedConfig, flag: str) -> PretrainedConfig:
    """Return the config of the side that `flag` asks for where a model reads images and texts."""
    side = {"--vit_type": "vision_config", "--bert_path": "text_config"}[flag]
    return getattr(config, side, config)


def load_backbone(source: str | PretrainedConfig, flag: str) -> nn.Module:
    """Return the backbone in float32 without its pooling layer.

    `source` is a hub id, a local folder, or a config, which gives random weights. Raises InputError
    where it can't be found, is of a kind that reads something else than `flag` asks for, or where
    the file's weights leave a part of the network uninitialised.
    """
    config = load_config(source, flag) if isinstance(source, str) else source
    kind = _model_class(config, source, flag)
    if config.model_type.startswith("siglip"):
        config.vision_use_head = False  # the pooling head would be left without gradient
    options = {}
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options["add_pooling_layer"] = False
    if not isinstance(source, str):
        _check_size(config, flag)
        with as_input_error(f"{flag}: no such network can be built"):
            return kind(config, **options).float()
    return _pretrained(kind, source, config, flag, options).float()


def _check_size(config: PretrainedConfig, flag: str) -> None:
    """Raise InputError where a network of this config can't fit, or its numbers are none."""
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    sizes = [getattr(config, name, 0) or 0 for name in (*names, "max_position_embeddings")]
    if all(isinstance(one, int) and one >= 0 for one in sizes):
        told = f"{flag} (width {sizes[0]}, {sizes[1]} layers, {sizes[4]} positions)"
        check_fits({told: transformer_bytes(*sizes)}, "its network")


def _pretrained(
    kind: type[PreTrainedModel], source: str, config: PretrainedConfig, flag: str, options: dict
) -> PreTrainedModel:
    try:
        with _report_silenced():
            loaded: Any = kind.from_pretrained(
                source,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    except Exception as error:  # a damaged file, a pickle that is refused, weights of another
        raise InputError(
            f"{flag} {source}: no weights could be loaded ({unreachable(error)})"
        ) from None
    model, report = loaded
    missing = [key for key in report["missing_keys"] if "position_ids" not in key]
    mismatched = [str(key) for key in report.get("mismatched_keys", [])]
    if missing or mismatched:
        raise InputError(
            f"{flag} {source}: the file lacks or has other shapes for "
            f"{len(missing) + len(mismatched)} weights, the first {(*missing, *mismatched)[0]}"
        )
    return model


@contextmanager
def _report_silenced() -> Iterator[None]:
    """Keep transformers from printing its table of loaded weights: what is wrong is told here.

    A checkpoint of pretraining always has heads that the backbone does not take.
    """
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _model_class(config: PretrainedConfig, source, flag: str) -> type[PreTrainedModel]:
    """Return the class that AutoModel takes for `config`; InputError where it suits no side."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kind: Any = getattr(transformers, TOWERS.get(config.model_type, ""), None)
    kind = kind or MODEL_MAPPING.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    reads = [] if kind is None else inspect.signature(kind.forward).parameters
    if INPUTS[flag] not in reads or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{flag} {source}: model type {config.model_type!r} is not supported; "
            f"choose one of {KNOWN[flag]}"
        )
    return kind


def freeze_unreached(backbone: nn.Module, output: Tensor) -> None:
    """Take the gradient from every parameter that `output`, made with a graph, does not reach.

    Mask tokens, poolers and the norms before them would else wait for a gradient that never comes,
    which DistributedDataParallel takes for an error.
    """
    reached, seen, stack = set(), set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    for parameter in backbone.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def unreachable(error: BaseException) -> str:
    """Return why a hub gave nothing: the error's first line, or that HF_HUB_OFFLINE forbids it."""
    offline = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if any(value.upper() in ("1", "ON", "YES", "TRUE") for value in offline):
        return f"HF_HUB_OFFLINE is set, and the model is not in the cache; {first_line(error)}"[
            :200
        ]
    return first_line(error)
