"""A YAML file of flags -> the words that it stands for on the command line."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lib.errors import InputError
from lib.files import read_text

FLAG = "--config"


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Return `argv` behind the words of the file that its --config names, so that `argv` wins."""
    words = list(argv)
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == FLAG and (value or place + 1 < len(words)):
            return [*config_words(parser, value or words[place + 1]), *words]
    return words


def config_words(parser: argparse.ArgumentParser, path: str | os.PathLike) -> list[str]:
    """Return the file's flags as command-line words.

    Raises InputError where the file is no mapping of flags that `parser` knows to plain values.
    """
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: give one flag a line, as batch_size: 128")
    return flag_words_of(parser, values, path)


def load_yaml(path: str | os.PathLike) -> Any:
    """Return what a YAML file holds. Raises InputError naming the file and the line."""
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it can't be read"
        raise InputError(f"{path}{line}: not YAML ({problem})") from None


def flag_words_of(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], source: str | os.PathLike
) -> list[str]:
    """Return flags with their values as command-line words; InputError names the `source`."""
    words: list[str] = []
    for key, value in values.items():
        words += _words(_action(parser, key, source), key, value, source)
    return words


def _action(parser: argparse.ArgumentParser, key: Any, path: str | os.PathLike) -> argparse.Action:
    known = parser._option_string_actions
    for spelt in (f"--{key}", f"--{str(key).replace('_', '-')}"):
        if spelt in known and spelt not in (FLAG, "--help"):
            return known[spelt]
    names = [name.removeprefix("--") for name in known]
    alike = difflib.get_close_matches(str(key), names, 1)
    hint = f"; did you mean {alike[0]}?" if alike else "; --help lists the flags"
    raise InputError(f"{path}: {key} is no flag that a file may hold{hint}")


def _words(action: argparse.Action, key: Any, value: Any, path: str | os.PathLike) -> Sequence[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0:  # present or not
        if not isinstance(value, bool):
            raise InputError(f"{path}: {key} is {value!r:.60}; give true or false")
        return [flag] if value else []
    parts = value if isinstance(value, list) else [value]
    if not parts or any(isinstance(part, (dict, list)) for part in parts):
        raise InputError(f"{path}: {key} is {value!r:.60}, which {flag} does not take")
    words = [str(int(part)) if isinstance(part, bool) else str(part) for part in parts]
    if len(words) == 1:
        return [f"{flag}={words[0]}"]  # a value that begins with a hyphen is no flag
    return [flag, *words]
