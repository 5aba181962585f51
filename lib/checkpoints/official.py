"""Official checkpoints of the LAPS family and D2S-VSE: their layout, flags and weight names."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.checkpoints import official_d2s
from lib.errors import InputError, as_input_error
from lib.files import load_object
from lib.methods import registry
from lib.methods.base import Method
from lib.model.backbones import hub_id

METHODS = ("laps", "seps_released", "ilaps")
PREFIXES = ("img_enc.", "txt_enc.", "cross_net.")

# Official module -> ours; the longest prefix comes first.
MODULES = {
    "img_enc.visual_encoder.": "image_encoder.backbone.",
    "img_enc.vision_proj.": "image_encoder.proj.",
    "txt_enc.bert.": "text_encoder.backbone.",
    "txt_enc.fc.": "text_encoder.proj.",
    "cross_net.aggr_net.": "network.head.",
    "cross_net.tok_select_net.": "word_selection.",
    "cross_net.i2t_attn_mat.": "i2t_attention.",
    "cross_net.t2i_attn_mat.": "t2i_attention.",
    "cross_net.temp": "temperature",
}

# What releases of transformers have renamed in ViT, Swin and BERT since the checkpoints were
# written. Each step may or may not apply: the installed model's own names decide.
RENAMES = (
    (r"\.encoder\.layers?\.", ".layers."),
    (r"attention\.(?:attention|self)\.", "attention."),
    (r"attention\.(query|key|value)\.", lambda match: f"attention.{match[1][0]}_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"attention\.(relative_position_bias_table)", r"attention.relative_position_bias.\1"),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(?<!attention\.)output\.dense\.", "mlp.fc2."),
)

# Never read by these models, or computed anew by the installed transformers.
IGNORED = re.compile(r"\.pooler\.|\.position_ids$|\.relative_position_index$")


def is_official(payload: dict[str, Any]) -> bool:
    """Return True for a payload in the layout of the official LAPS family or D2S-VSE."""
    state = payload.get("model") if isinstance(payload, dict) else None
    if "format" in payload or not isinstance(state, dict):
        return False
    return any(_bare(key).startswith(PREFIXES) for key in state)


def _bare(key: str) -> str:
    """Return an official key without DistributedDataParallel's prefix."""
    return str(key).removeprefix("module.")


def load_official(
    payload: dict[str, Any],
    method: str | None = None,
    vit_path: str | None = None,
    bert_path: str | None = None,
) -> tuple[Method, argparse.Namespace]:
    """Return (model, arguments) of an official checkpoint, every weight accounted for.

    `method` says whose file it is: "laps" or "seps_released"; improved LAPS and D2S-VSE (read as
    "d2s_released", or "d2s" on request) are recognised without it. `vit_path` and `bert_path` are
    folders with the backbones' config.json; without them the names in the file's own `opt` are
    looked up. Raises InputError where the method does not fit, a config can't be found, or a weight
    is missing, left over or of another shape.
    """
    opt = payload.get("opt")
    if not isinstance(opt, argparse.Namespace):
        raise InputError("the official checkpoint holds no `opt` namespace with its flags")
    state, flags = payload["model"], vars(opt)
    if official_d2s.is_d2s(state):
        method = _d2s_method(method)
        state, flags = official_d2s.translated(state), official_d2s.translated_flags(flags)
    else:
        method = _method_of(flags, method)
    registry.check_kept_arguments({**flags, "shard_size": 1}, "the official checkpoint's opt")
    args = _arguments(flags, method)
    args.vit_type = vit_path or _image_source(args)
    args.bert_path = bert_path or _text_source(args)
    image_config = _config(args.vit_type, "--vit_path", ("vit", "swin"))
    text_config = _config(args.bert_path, "--bert_path", ("bert",))
    with as_input_error("no model can be built from the official checkpoint"):
        model = registry.build_model(args, text_config["vocab_size"], image_config, text_config)
        model.load_state_dict(converted_state(state, model.state_dict()))
    return model, args


def _d2s_method(method: str | None) -> str:
    """Return how a D2S-VSE file is to be read: as released where nothing else is asked for."""
    if method not in (None, *official_d2s.METHODS):
        raise InputError(
            f"this file is a D2S-VSE model: --method d2s_released or d2s, not {method}"
        )
    return method or "d2s_released"


def _method_of(flags: dict[str, Any], method: str | None) -> str:
    """Return the method's name. Raises InputError where it is unknown or contradicts the flags."""
    improved = "similarity_calc_method" in flags
    if method is None and improved:
        return "ilaps"
    if method is None:
        raise InputError(
            "an official checkpoint does not tell LAPS from SEPS, which give different numbers on "
            "the same weights: add --method laps or --method seps_released"
        )
    if method not in METHODS:
        raise InputError(
            f"--method {method} has no official checkpoint that is read here; "
            f"choose one of {', '.join(METHODS)} (the published SEPS files are seps_released) or, "
            "for files of D2S-VSE, d2s_released"
        )
    if method == "ilaps" and not improved:
        raise InputError(
            "this file has none of improved LAPS's flags: --method laps or seps_released, not ilaps"
        )
    changed = (
        flags.get("use_cls_as_glob_embd")
        or flags.get("use_token_selection")
        or flags.get("similarity_calc_method") not in (None, "max")
    )
    if changed and method != "ilaps":
        raise InputError(f"this file is an improved-LAPS model: --method ilaps, not {method}")
    return method


def _arguments(flags: dict[str, Any], method: str) -> argparse.Namespace:
    """Return the file's flags over the defaults of all others.

    NOTE: its shard_size is left out: there it counts captions on one side, here pairs on both.
    """
    args = registry.model_defaults()
    vars(args).update({key: value for key, value in flags.items() if key != "shard_size"})
    args.method = method
    return args


def _image_source(args: argparse.Namespace) -> str:
    """Return the hub id of the image encoder; LAPS's flag leaves the resolution out."""
    if args.method in official_d2s.METHODS:
        return hub_id(args.vit_type)
    large = args.vit_type in ("vit", "swin") and args.img_res == 384
    return hub_id(f"{args.vit_type}_384" if large else args.vit_type)


def _text_source(args: argparse.Namespace) -> str:
    """Return the text encoder's folder, or the hub id that a folder of another machine ends in."""
    path = Path(args.bert_path)
    return str(path) if path.is_dir() else hub_id(path.name)


def _config(source: str, flag: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the config in a folder or of a hub id. Raises InputError where there is none."""
    from transformers import AutoConfig  # slow to import, and only needed here

    if os.path.isdir(source):
        load_object(Path(source) / "config.json", f"{flag} names a folder with a model's config")
    try:
        config = AutoConfig.from_pretrained(source).to_dict()
    except Exception:  # transformers lets whatever a strange config provokes through
        raise InputError(
            f"{source} is neither a folder with a config.json nor a model whose config the hub "
            f"hands out here; name such a folder with {flag}"
        ) from None
    if config.get("model_type") not in kinds:
        told = config.get("model_type")
        raise InputError(f"{flag} {source}: a {told} config, not {'/'.join(kinds)}")
    return config


def converted_state(official: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the official weights under our names: exactly the keys of `own`.

    `own` is the state dict of the model to be filled; buffers that transformers computes are taken
    from it. Raises InputError naming the keys that are missing, left over or of another shape.
    """
    state = {key: value for key, value in own.items() if IGNORED.search(key)}
    left_over = []
    for key, value in official.items():
        if IGNORED.search(key):
            continue
        names = _possible_names(_bare(key)) & own.keys() - state.keys()
        if len(names) != 1 or not isinstance(value, Tensor):
            left_over.append(key)
            continue
        state[names.pop()] = value
    check_complete(
        state,
        own,
        left_over,
        "the official weights do not fit this model ({}); see --method, and the config.json in "
        "--vit_path and --bert_path",
    )
    return state


def _possible_names(key: str) -> set[str]:
    """Return every name of ours that an official key may have had in a release of transformers."""
    for theirs, ours in MODULES.items():
        if key.startswith(theirs):
            key = ours + key[len(theirs) :]
            break
    names = {key}
    if ".backbone." in key:
        for pattern, replacement in RENAMES:
            names |= {re.sub(pattern, replacement, name) for name in names}
    return names


def canonical_name(key: str) -> str:
    """Return one name for a key of ours whichever release of transformers gave it its own."""
    if ".backbone." in key:
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
    return key


def check_complete(
    state: dict[str, Tensor], own: dict[str, Tensor], left_over: list[str], sentence: str
) -> None:
    """Raise InputError where `state` does not give each key of `own` a tensor of its shape.

    What is missing, left over or of another shape takes the place of {} in `sentence`.
    """
    missing = [key for key in own if key not in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    found = [("missing", missing), ("left over", left_over), ("of another shape", shapes)]
    told = "; ".join(
        f"{what}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if keys[3:] else "")
        for what, keys in found
        if keys
    )
    if told:
        raise InputError(sentence.format(told))
