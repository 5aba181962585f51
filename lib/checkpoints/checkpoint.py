"""Checkpoints: tensors and plain data only, written so that a crash leaves the old one whole."""

from __future__ import annotations

import argparse
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.checkpoints.official import canonical_name, check_complete, is_official, load_official
from lib.checkpoints.payloads import read_payload
from lib.errors import InputError, as_input_error
from lib.methods import registry
from lib.methods.base import Method
from lib.model.backbones import load_config

LAST, BEST = "checkpoint_last.pth", "model_best.pth"  # names in a run folder
FORMAT = "seps-checkpoint"
VERSION = 1
ENTRIES = {  # what every checkpoint holds, and of what kind
    "version": int,
    "method": str,
    "args": dict,
    "image_config": (dict, type(None)),
    "text_config": (dict, type(None)),
    "vocabulary": (list, dict, type(None)),  # words, or a tokenizer of its own
    "model": dict,
}


def save_payload(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` to a temporary file in the same folder, flush it, then rename it to `path`.

    Raises OSError where it can't be written whole; the file that was at `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # one name: a crash leaves at most one
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into RuntimeError
        raise OSError(
            f"{path}: the checkpoint could not be written ({_reason(error)}); "
            "the one before it is whole: free some space, then go on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut, where the system allows it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: BaseException) -> str:
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def model_payload(
    model: Method,
    args: argparse.Namespace,
    vocabulary: list[str] | dict[str, Any] | None,
    **facts: Any,
) -> dict[str, Any]:
    """Return what rebuilds the model anywhere, without a model hub: weights, flags, configs, words.

    `facts` are plain values that describe the moment: epoch, step, best_rsum, val_split.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "transformers": metadata.version("transformers"),
        "method": model.name,
        "args": plain_arguments(args),
        "image_config": _config(model.image_encoder),
        "text_config": _config(model.text_encoder),
        "vocabulary": vocabulary,
        "model": model.state_dict(),
        **facts,
    }


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON-able values."""
    return json.loads(json.dumps(vars(args), default=str))


def _config(encoder: nn.Module | None) -> dict | None:
    """Return what rebuilds the encoder; None for precomputed regions and where there is none."""
    return encoder.config() if hasattr(encoder, "config") else None


def load_model(
    path: str | Path,
    method: str | None = None,
    vit_path: str | None = None,
    bert_path: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Method, argparse.Namespace]:
    """Return (model in evaluation mode, its arguments) from our own or an official checkpoint.

    `path` is a checkpoint file, a model's or run's folder, or the id of one on a hub.

    Official files need `method` ("laps", "seps_released" or "ilaps"); `vit_path` and `bert_path`
    are folders with the backbones' config.json, which spare the model hub. Nothing pickled is ever
    executed. Raises InputError where the file can't be read, or a weight is missing or left over.
    """
    return restore_model(path, read_payload(path), method, vit_path, bert_path, device)


def restore_model(
    path: str | Path,
    payload: dict[str, Any],
    method: str | None = None,
    vit_path: str | None = None,
    bert_path: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Method, argparse.Namespace]:
    """Return what `load_model` does, from a `payload` already read; `path` is for its messages."""
    if is_official(payload):
        model, args = load_official(payload, method, vit_path, bert_path)
    else:
        model, args = _load_own(path, payload, method, vit_path, bert_path)
    return model.to(device).eval(), args


def _load_own(
    path: str | Path,
    payload: dict,
    method: str | None,
    vit_path: str | None,
    bert_path: str | None,
) -> tuple[Method, argparse.Namespace]:
    check_contents(path, payload)
    if method is not None and method != payload["method"]:
        raise InputError(f"{path} holds a {payload['method']} model; leave out --method {method}")
    args = merged_arguments(payload)
    image_config, text_config = payload["image_config"], payload["text_config"]
    if vit_path:
        image_config = load_config(vit_path, "--vit_type").to_dict()
    if bert_path:
        text_config = load_config(bert_path, "--bert_path").to_dict()
    with as_input_error(f"{path}: no model can be built from it"):
        vocab_size = text_config["vocab_size"] if text_config else len(payload["vocabulary"])
        model = registry.build_model(args, vocab_size, image_config, text_config)
        load_weights(path, model, payload["model"])
    model.set_hard_negatives(bool(payload.get("hard_negatives", False)))
    return model, args


def check_contents(path: str | Path, payload: dict) -> None:
    """Raise InputError where a payload is none of ours, or an entry is missing or mistyped."""
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise InputError(f"{path} is neither one of our checkpoints nor an official one")
    for name, kinds in ENTRIES.items():
        if name not in payload:
            raise InputError(f"{path}: a checkpoint without {name!r}, so not a whole one")
        if not isinstance(payload[name], kinds) or isinstance(payload[name], bool):
            told = type(payload[name]).__name__
            raise InputError(f"{path}: {name!r} is of type {told}, which no checkpoint holds there")
    if payload["version"] > VERSION:
        raise InputError(
            f"{path} was written in version {payload['version']} of the format; "
            f"this program reads up to version {VERSION}: update it"
        )
    known = registry.method_names()
    if payload["method"] not in known:
        raise InputError(
            f"{path} holds a {payload['method']!r} model, a method that this program does not know "
            f"({', '.join(known)})"
        )
    if not all(isinstance(word, str) for word in payload["vocabulary"] or []):
        raise InputError(f"{path}: 'vocabulary' holds more than words")
    if not isinstance(payload.get("hard_negatives", False), bool):
        raise InputError(f"{path}: 'hard_negatives' is neither True nor False")
    if not all(isinstance(one, torch.Tensor) for one in payload["model"].values()):
        raise InputError(f"{path}: 'model' holds more than tensors")
    registry.check_kept_arguments(payload["args"], f"{path}: args")


def merged_arguments(payload: dict) -> argparse.Namespace:
    """Return the checkpoint's arguments over the defaults of flags younger than it."""
    args = registry.model_defaults()
    vars(args).update(payload["args"])
    args.method = payload["method"]
    return args


def load_weights(path: str | Path, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict in which every key and shape must agree. Raises InputError naming them.

    Backbone keys may be those of another release of transformers.
    """
    own = model.state_dict()
    if state.keys() != own.keys():
        names = {canonical_name(key): key for key in own}
        state = {names.get(canonical_name(key), key): value for key, value in state.items()}
    extra = [key for key in state if key not in own]
    check_complete(state, own, extra, f"{path}: the weights do not fit this model ({{}})")
    model.load_state_dict(state)


def start_weights(path: str | Path, model: Method, payload: dict[str, Any]) -> None:
    """Give a new run's model the weights of the stage before, the checkpoint `payload`.

    Raises InputError where it is of another method or network.
    """
    other, _ = restore_model(path, payload)
    try:
        model.start_from(other)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise InputError(
            f"{path} is of another network: give the --vit_type, --bert_path, --img_res and "
            f"--embed_size of that run ({told:.200})"
        ) from None


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Return a whole checkpoint of our own, for resuming. Raises InputError where it is not one."""
    payload = read_payload(path)
    check_contents(path, payload)
    if not isinstance(payload.get("training"), dict):
        raise InputError(f"{path} holds no training state; resume from a checkpoint_last.pth")
    return payload
