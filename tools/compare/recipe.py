"""A comparison written down in YAML: its rows, flags, seeds, and what is tuned for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from arguments import train_parser
from lib.config_file import flag_words_of, load_yaml
from lib.errors import InputError
from lib.retrieval.comparison import Row

KEYS = {"dataset", "seeds", "against", "flags", "rows", "tuning", "looks"}


@dataclass(frozen=True)
class Tuning:
    """Trials that each row gets alike, on a seed of their own; the best of dev is taken."""

    seed: int
    flags: tuple[str, ...]  # of every trial, as a shorter training
    trials: dict[str, tuple[str, ...]]  # by name


@dataclass(frozen=True)
class Looks:
    """What is looked at beside recall, of rows that choose patches."""

    images: int  # the first of test, for controls
    controls: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()  # ids of the images whose kept patches are drawn, on the first seed
    every_seed: bool = False  # controls on each seed, not on the first alone


@dataclass(frozen=True)
class Recipe:
    """What a comparison runs; `against` is the row that all others are compared with."""

    dataset: str
    seeds: tuple[int, ...]
    flags: tuple[str, ...]
    rows: tuple[Row, ...]
    against: str | None = None
    tuning: Tuning | None = None
    looks: Looks | None = None


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file.

    Raises InputError with the file where it is none, or names a key, flag or row that is unknown.
    """
    values = _mapping(load_yaml(path), "a recipe", path)
    unknown = sorted(set(values) - KEYS, key=str)
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is no part of a recipe: {', '.join(sorted(KEYS))}")
    rows = _mapping(values.get("rows"), "rows", path)
    if not rows or "dataset" not in values:
        raise InputError(f"{path}: a recipe needs a dataset and rows")
    rows = {str(name): _words(flags, f"row {name}", path) for name, flags in rows.items()}
    against = None if values.get("against") is None else str(values["against"])
    before = [flag[1:] for flags in rows.values() for flag in flags if flag.startswith("@")]
    for told, name in (("against: ", against), *(("@", one) for one in before)):
        if name is not None and name not in rows:
            raise InputError(f"{path}: {told}{name} is none of the rows")
    return Recipe(
        dataset=str(values["dataset"]),
        seeds=tuple(_integers(values.get("seeds", [0, 1, 2]), "seeds", path)),
        flags=_words(values.get("flags", {}), "flags", path),
        rows=tuple(Row(name, flags, baseline=name == against) for name, flags in rows.items()),
        against=against,
        tuning=_tuning(values.get("tuning"), path),
        looks=_looks(values.get("looks"), path),
    )


def _tuning(values: Any, path: str | Path) -> Tuning | None:
    if values is None:
        return None
    given = _mapping(values, "tuning", path)
    trials = _mapping(given.get("trials"), "tuning: trials", path)
    if not trials or set(given) - {"seed", "flags", "trials"}:
        raise InputError(f"{path}: tuning holds seed, flags and trials, of which there is one")
    return Tuning(
        seed=_integers([given.get("seed", 100)], "tuning: seed", path)[0],
        flags=_words(given.get("flags", {}), "tuning: flags", path),
        trials={
            str(name): _words(flags or {}, f"trial {name}", path) for name, flags in trials.items()
        },
    )


def _looks(values: Any, path: str | Path) -> Looks | None:
    if values is None:
        return None
    given = _mapping(values, "looks", path)
    if "images" not in given or set(given) - {"images", "controls", "drawn", "every_seed"}:
        raise InputError(f"{path}: looks holds images, controls, drawn and every_seed")
    if not isinstance(given.get("every_seed", False), bool):
        raise InputError(f"{path}: looks: every_seed: give true or false")
    if given["images"] == 0:
        raise InputError(f"{path}: looks: images: give at least 1")
    names = {key: tuple(str(one) for one in given.get(key) or ()) for key in ("controls", "drawn")}
    images = _integers([given["images"]], "looks: images", path)[0]
    return Looks(images, **names, every_seed=given.get("every_seed", False))


def _words(values: Any, where: str, path: str | Path) -> tuple[str, ...]:
    words = flag_words_of(train_parser(), _mapping(values, where, path), f"{path}: {where}")
    # as a person writes them; a value that begins with a hyphen stays with its flag
    parts = (word.split("=", 1) if "=-" not in word else [word] for word in words)
    return tuple(chain.from_iterable(parts))


def _mapping(values: Any, where: str, path: str | Path) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{path}: {where} must be names with values, as margin: 0.2")
    return values


def _integers(values: Any, where: str, path: str | Path) -> Sequence[int]:
    if not isinstance(values, list) or not all(type(one) is int and one >= 0 for one in values):
        raise InputError(f"{path}: {where}: give whole numbers from 0 on")
    return values
