"""Files of an evaluation in shards: arrays with facts, checksummed, written whole; its manifest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.batch import Tokens
from lib.errors import InputError
from lib.files import read_json, temporary_beside
from lib.retrieval.result_files import DAMAGED

MANIFEST = "manifest.json"
FORMAT, VERSION = "evaluation-shards", 1
FACTS = "facts"  # the array that holds them, as JSON
BFLOAT16 = ":bf16"  # ends the name of an array whose bits are bfloat16, which numpy lacks
PLAIN, NESTED = ("mask", "local", "cls", "sentence"), ("dense", "fragments")  # fields of `Tokens`
# what an OSError says of the machine, not of the file that was read
ELSEWHERE = {errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
TOLD = {  # what a manifest holds beside the data's fingerprint, in words
    "checkpoint_sha256": "another checkpoint",
    "data": "other captions or images",
    "images": "other image files",
    "commit": "another version of this code",
    "code": "other files of this code",
    "versions": "other versions of Python or its packages",
    "device": "another kind of device",
}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and plain facts as one .npz, whole or not at all; zip keeps checksums."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, **{FACTS: np.array(json.dumps(facts))})
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} can't be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return what `write_arrays` wrote.

    None where nothing is there; a damaged file is removed and counts as none: it is made anew.
    Raises OSError where the file can't be read though it may be whole.
    """
    arrays = _loaded(path)
    return None if arrays is None else (arrays, json.loads(str(arrays.pop(FACTS))))


def read_facts(path: Path) -> dict[str, Any] | None:
    """Return the facts alone, without reading the arrays; None and errors as `read_arrays`."""
    found = _loaded(path, FACTS)
    return None if found is None else json.loads(str(found[FACTS]))


def _loaded(path: Path, *names: str) -> dict[str, np.ndarray] | None:
    """Return the arrays of these names, all of the file where none is given."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in names or file.files}
        return found
    except FileNotFoundError:
        return None
    except (*DAMAGED, ValueError, KeyError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in ELSEWHERE:
            raise
        with suppress(OSError):
            path.unlink()
        return None


# --- tokens ------------------------------------------------------------------------------------


def token_arrays(tokens: Tokens, prefix: str = "") -> dict[str, np.ndarray]:
    """Return features as arrays, to the bit, padding left out."""
    arrays = {}
    for name in PLAIN:
        tensor, ending = getattr(tokens, name), ""
        if tensor is None:
            continue
        tensor = (tensor[tokens.mask] if name == "local" else tensor).detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor, ending = tensor.contiguous().view(torch.int16), BFLOAT16
        arrays[prefix + name + ending] = tensor.numpy()
    for name in NESTED:
        if (inner := getattr(tokens, name)) is not None:
            arrays |= token_arrays(inner, f"{prefix}{name}.")
    return arrays


def arrays_tokens(
    arrays: Mapping[str, np.ndarray], device: torch.device, prefix: str = ""
) -> Tokens | None:
    """Return the features of `token_arrays`, zeros in the place of padding; None without any."""
    found: dict[str, Tensor] = {}
    for name in PLAIN:
        if prefix + name in arrays:
            found[name] = torch.from_numpy(arrays[prefix + name]).to(device)
        elif prefix + name + BFLOAT16 in arrays:
            bits = torch.from_numpy(arrays[prefix + name + BFLOAT16])
            found[name] = bits.view(torch.bfloat16).to(device)
    if not found:
        return None
    real, mask = found.pop("local"), found.pop("mask")
    local = real.new_zeros(*mask.shape, real.shape[-1])  # (B, N, C)
    local[mask] = real
    inner = {name: arrays_tokens(arrays, device, f"{prefix}{name}.") for name in NESTED}
    return Tokens(local, mask, **found, **inner)


# --- the manifest ------------------------------------------------------------------------------


def open_manifest(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Begin a folder of shards, or check that the one there is of the same.

    Raises InputError where it was made from anything else, or holds something else.
    """
    wanted = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **made_from}))
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--shards {folder}: a file of that name is there; name a folder")
    if not path.exists():
        there = os.listdir(folder) if folder.exists() else []
        # another process may have begun it a moment ago
        if MANIFEST not in there and any(not one.startswith(".") for one in there):
            raise InputError(f"--shards {folder} is there and holds other files: name a new folder")
        _create(folder, wanted)
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise InputError(f"--shards: {path} is no manifest of an evaluation; name a new folder")
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        names = ", ".join(TOLD.get(name, f"another {name}") for name in differing)
        raise InputError(
            f"--shards {folder} was begun with {names}: give it what it was begun with, or name a "
            "new folder"
        )


def _create(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest where there is none: of several processes the first one's stands."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(folder / MANIFEST)
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise InputError(f"--shards {folder} can't be written ({error.strerror})") from None
    try:
        os.link(temporary, folder / MANIFEST)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
