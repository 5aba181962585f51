"""Ensembles: the similarity matrices of several models added, and labelled as such."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.retrieval.protocol import strictest

SHARED = {  # what members must share, by the key of their data's fingerprint
    "split": "the split",
    "captions_sha256": "the captions' words or order",
    "ids_sha256": "the image ids",
}
LONGEST_NAME = 150  # of a folder, before its digest
UNEVEN = 3.0  # times wider: one member decides nearly alone


def added(matrices: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Return the sum of the members' similarities, (N_images, N_captions): the field's habit.

    `weights` are the members' factors, 1 without them. Raises InputError where the members are not
    of the same images and captions.
    """
    shapes = {matrix.shape for matrix in matrices}
    if len(shapes) > 1:
        raise InputError(
            f"--ensemble: the members scored {' and '.join(map(str, sorted(shapes)))} images and "
            "captions; they must share one data set"
        )
    total = np.zeros(matrices[0].shape)
    for matrix, weight in zip(matrices, weights or [1.0] * len(matrices), strict=True):
        for image, row in zip(total, matrix, strict=True):  # no further matrix in float64
            image += np.multiply(row, weight, dtype=np.float64)
    return total


def ensemble_label(weights: Sequence[float] | None) -> str:
    """Return the end of an entry's name: _ensemble, with weights _ensemble_1_0.5."""
    return "_".join(["_ensemble", *(f"{one:g}" for one in weights or ())])


def ensemble_facts(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a result of several models says in the place of one model's facts.

    The protocol is that of the member that was told most; a control of one is one of the sum.
    """
    controls = [one["selection_control"] for one in members if "selection_control" in one]
    facts = {
        "method": "ensemble of " + ", ".join(str(one["method"]) for one in members),
        "protocol": strictest([one["protocol"] for one in members]),
        "val_split": " and ".join(sorted({str(one["val_split"]) for one in members})),
        "trained_on_dense": any(one.get("trained_on_dense") for one in members),
        "members": [dict(one) for one in members],
    }
    return {**facts, "selection_control": controls[0]} if controls else facts


def check_same_data(names: Sequence[str], data: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where members score other captions than the first, or in another order.

    data: what `split_fingerprint` says of each member's split.
    """
    for name, one in zip(names[1:], data[1:], strict=True):
        differing = [told for key, told in SHARED.items() if one[key] != data[0][key]]
        if differing:
            raise InputError(
                f"--ensemble: {names[0]} and {name} differ in {' and '.join(differing)}; they must "
                "score the same data: name it with --dataset and --data_path"
            )


def ensemble_folder(runs: str | Path, checkpoints: Sequence[Path], usual: str) -> Path:
    """Return where the results of an ensemble go: beside no single model's, nor another ensemble's.

    Checkpoints named `usual` in folders right below `runs` give it their names, others a digest
    besides.
    """
    home = Path(runs).resolve()
    places = [one.resolve() for one in checkpoints]
    name = "+".join(one.parent.name for one in checkpoints)
    plain = all(one == home / one.parent.name / usual for one in places)
    if not plain or name.count("+") >= len(places) or len(name) > LONGEST_NAME:
        told = "\n".join(str(Path(os.path.relpath(one, home))) for one in places)
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return Path(runs) / "ensembles" / name


def uneven_spreads(
    names: Sequence[str], matrices: Sequence[np.ndarray], weights: Sequence[float] | None = None
) -> str | None:
    """Return a sentence where one member's share of the sum spreads much wider than another's."""
    factors = weights or [1.0] * len(matrices)
    spreads = [w * float(matrix.std()) for w, matrix in zip(factors, matrices, strict=True)]
    widest, narrowest = int(np.argmax(spreads)), int(np.argmin(spreads))
    if spreads[widest] <= UNEVEN * spreads[narrowest]:
        return None
    times = spreads[widest] / max(spreads[narrowest], 1e-12)
    return (
        f"{names[widest]} spreads {times:.0f} times wider than {names[narrowest]}, and so decides "
        "most of the sum"
    )
