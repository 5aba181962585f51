"""Result files: what made a result, the results.json of a folder, per-query ranks beside it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError, InputWarning
from lib.files import load_object, read_json, temporary_beside, write_text_whole
from lib.retrieval.metrics import QueryRanks

RESULTS = "results.json"
DAMAGED = (OSError, zipfile.BadZipFile, zlib.error)  # what a torn .npz raises
RANKS = ("i2t", "t2i", "caption_images")  # arrays of a file of ranks
CHANGES = "+changes"  # behind the commit of files that differ from it
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class StoredResult:
    """One entry of a results.json with its per-query ranks."""

    folder: Path
    name: str  # of the entry, as f30k_1k
    facts: dict[str, Any]
    ranks: QueryRanks


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_facts() -> dict[str, Any]:
    """Return what any result says of the moment it was made: commit, versions, date (UTC)."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def code_digest() -> str:
    """Return a SHA-256 of this program's own files, which tells changes that no commit does."""
    root = Path(__file__).resolve().parents[2]
    files = [one for kind in ("*.py", "lib/**/*.py", "lib/**/*.[ch]") for one in root.glob(kind)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _commit() -> str | None:
    """Return the commit of this code, `CHANGES` behind it where files differ; None without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (CHANGES if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON; entries of other splits that are already there stay.

    A file there that is damaged is kept under another name, and warned of.
    """
    path, known = Path(path), {}
    if path.exists():
        try:
            known = load_object(path)
        except InputError as error:
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            warnings.warn(f"{error}; kept as {aside}", InputWarning, stacklevel=2)
    write_text_whole(path, json.dumps({**known, **results}, indent=2) + "\n")


def save_matrix(path: str | Path, matrix: np.ndarray) -> None:
    """Write a matrix as a .npy file under exactly that name, whole or not at all."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            np.save(file, matrix)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- ranks -------------------------------------------------------------------------------------


def ranks_file(name: str) -> str:
    """Return the name of the file beside results.json with the ranks of entry `name`."""
    return f"ranks_{name}.npz"


def write_ranks(path: str | Path, ranks: QueryRanks) -> None:
    """Write the rank of every query, compressed; nothing pickled.

    Several processes may write one file at the same time, as the last ones of eval.py --shards.
    """
    path = Path(path)
    arrays = {name: getattr(ranks, name).astype(np.int32) for name in RANKS}
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(
                file, **arrays, folds=np.int32(ranks.folds), ties=np.int32(ranks.ties)
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_ranks(path: str | Path) -> QueryRanks:
    """Return what `write_ranks` wrote. Raises InputError where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in RANKS}
            folds, ties = int(file["folds"]), int(file["ties"])
    except FileNotFoundError:
        raise InputError(
            f"no file {path} with the rank of each query: evaluate once more with eval.py, which "
            "writes it beside results.json"
        ) from None
    except (*DAMAGED, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} is no whole file of ranks ({error}): evaluate anew") from None
    i2t, t2i, caption_images = (found.astype(np.int64) for found in arrays.values())
    return QueryRanks(i2t, t2i, caption_images, folds, ties)


def stored_results(folder: str | Path) -> list[dict[str, StoredResult]]:
    """Return the results of a folder by entry: of itself, or else of its folders, a seed each.

    Raises InputError where there are none, or where ranks and results.json do not agree.
    """
    folder = Path(folder)
    if folder.name == RESULTS:
        folder = folder.parent
    homes = [folder] if (folder / RESULTS).exists() else []
    homes = homes or sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
    if not homes:
        raise InputError(
            f"{folder}: neither a {RESULTS} nor folders (of seeds) that hold one; eval.py writes it"
        )
    return [_stored(home) for home in homes]


def _stored(folder: Path) -> dict[str, StoredResult]:
    entries = read_json(folder / RESULTS)
    found = {
        name: StoredResult(folder, name, facts, read_ranks(folder / facts["ranks"]))
        for name, facts in entries.items()
        if isinstance(facts, dict) and "ranks" in facts
    }
    if not found:
        raise InputError(
            f"{folder / RESULTS} names no per-query ranks, as it is of an older version: evaluate "
            "once more with eval.py"
        )
    for one in found.values():
        if abs(one.ranks.metrics()["rsum"] - one.facts["rsum"]) > 1e-6:
            raise InputError(
                f"{folder}: the ranks of {one.name} do not give the rSum of {RESULTS}; they are of "
                "two evaluations: evaluate anew"
            )
    return found
