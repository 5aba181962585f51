"""Checkpoint files on disk, read without executing anything they hold; safetensors besides."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.checkpoints.hub import WEIGHTS, checkpoint_file, is_model_folder, read_folder
from lib.errors import InputError, as_input_error, first_line
from lib.files import check_file, parse_json

SAFETENSORS = ".safetensors"


def read_payload(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint holds, tensors on the CPU, without executing pickled code.

    `path` is a file, a model's or run's folder, or a hub id, as `checkpoint_file` takes them.
    Besides tensors and plain values only argparse.Namespace is let in, which official files hold.
    Raises InputError where the file is missing, is not a checkpoint, or asks for anything else; the
    refused name is in the message.
    """
    path = checkpoint_file(path)
    check_file(path)
    if path.name == WEIGHTS and is_model_folder(path.parent):
        return read_folder(path.parent)
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(_refusal(path, error)) from None
    except Exception as error:  # torch lets whatever a damaged file provokes through
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)})") from None
    if not isinstance(payload, dict):
        raise InputError(f"{path}: holds a {type(payload).__name__}, not a checkpoint")
    return payload


def write_safetensors(path: str | Path, payload: dict[str, Any]) -> None:
    """Write a payload in our format: "model" as tensors, each other entry as JSON in the metadata.

    Raises OSError where it can't be written; a file that was at `path` is then untouched.
    """
    tensors = {key: value.detach().clone().contiguous() for key, value in payload["model"].items()}
    facts = {key: json.dumps(value) for key, value in payload.items() if key != "model"}
    temporary = Path(path).with_name(f".{Path(path).name}.part")
    try:
        save_file(tensors, temporary, metadata=facts)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    with (
        as_input_error(f"{path}: not a readable checkpoint"),
        safe_open(path, framework="pt") as file,
    ):
        facts = {
            key: parse_json(value, f"{path}: {key}")
            for key, value in (file.metadata() or {}).items()
        }
        return {**facts, "model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118


def _refusal(path: str | Path, error: UnpicklingError) -> str:
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if name is None:
        return f"{path}: not a readable checkpoint ({first_line(error)})"
    return (
        f"{path}: refused, because it asks to load {name[1]}, and only tensors, plain values and "
        "argparse.Namespace are read; do not open it elsewhere unless you trust where it is from"
    )
