"""The command line of every program: no abbreviations, ranges checked, defaults in --help."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from lib.errors import InputError
from lib.ranges import check_ranges

WIDTH = 80  # columns of --help at most


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations, checks ranges, and errs in one sentence.

    A wrong command line prints the sentence and exits with 2; with `raises` it raises InputError
    in its place, for programs that turn it into an exit code themselves.
    """

    def __init__(self, prog: str | None = None, raises: bool = False, **settings: Any) -> None:
        settings = {"formatter_class": _Help, "allow_abbrev": False, **settings}
        super().__init__(prog, **settings)
        self.raises = raises

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Return the namespace, in which every number lies in its range."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: no such flag{self._alike(unknown[0])}")
        try:
            check_ranges(vars(found))
        except InputError as error:
            self.error(str(error))
        return found

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with the command line, in one line without the usage."""
        message = message.removeprefix("argument ")
        if self.raises:
            raise InputError(message)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def _alike(self, word: str) -> str:
        alike = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
        return f"; did you mean {alike[0]}?" if alike else "; --help lists them"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help of at most 80 columns in which every flag tells its default."""

    def __init__(self, prog: str, **settings: Any) -> None:
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=width, **settings)

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        silent = action.required or action.nargs == 0 or action.default is argparse.SUPPRESS
        if silent or "default" in told or not action.option_strings:
            return told
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        shown = "none" if default in (None, "") else default
        return f"{told} (default: {str(shown).replace('%', '%%')})"


class IntegerList(argparse.Action):
    """Whole numbers as several values, `9 15 20 25`, or in one word, `9,15,20,25`."""

    def __init__(self, *names: Any, **settings: Any) -> None:
        super().__init__(*names, **{"nargs": "+", "type": int_list, **settings})

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [number for part in values for number in part])


class Ratios(argparse.Action):
    """One number, kept as it is, or two in one word or several, `0.1,0.02`: a list."""

    def __init__(self, *names: Any, **settings: Any) -> None:
        super().__init__(*names, **{"nargs": "+", "type": _floats, **settings})

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        found = [number for part in values for number in part]
        if len(found) not in (1, 2):
            parser.error(f"{option_string}: give one number, or two: image,text")
        setattr(namespace, self.dest, found[0] if len(found) == 1 else found)


def _floats(text: str) -> list[float]:
    try:
        return [float(one) for one in text.strip("[]").split(",") if one.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give one number, or two: image,text") from None


def side_lengths(text: str) -> int | list[int]:
    """Return one side in pixels, or of "HxW" both, height first."""
    try:
        sides = [int(one) for one in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text}: give a side in pixels, or HEIGHTxWIDTH")
    return sides[0] if len(set(sides)) == 1 else sides


def int_list(text: str) -> list[int]:
    """Return the integers of a comma-separated list; an empty text gives none."""
    parts = [one for one in text.replace("[", "").replace("]", "").split(",") if one.strip()]
    try:
        return [int(one) for one in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers, e.g. 9 15 20") from None


def check_kinds(actions: Iterable[argparse.Action], values: Mapping[str, Any], source: str) -> None:
    """Raise InputError where a value kept in a file is not of the kind that its flag takes.

    Values of unknown names pass; None passes where it is the default.
    """
    known = {action.dest: action for action in actions}
    for name, value in values.items():
        action = known.get(name)
        if action is None or (value is None and action.default is None):
            continue
        many = isinstance(action, IntegerList)
        either = isinstance(action, Ratios) or action.type is side_lengths
        listed = isinstance(value, (list, tuple)) and (many or (either and len(value) == 2))
        parts = value if listed else [value]
        right = all(_is_kind(action, one) for one in parts) and (listed or not many)
        if not right:
            raise InputError(f"{source}: {name} is {value!r:.60}, which --{name} does not take")
    check_ranges({name: value for name, value in values.items() if name in known}, source)


def _is_kind(action: argparse.Action, value: Any) -> bool:
    if action.choices is not None and value not in list(action.choices):
        return False
    if action.nargs == 0:
        return isinstance(value, bool)
    kind = action.type
    if kind in (int, int_list, side_lengths):
        return isinstance(value, int)
    if kind in (float, _floats):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, str) if kind is None else True


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """Return the names (dest) of the flags that stand on the command line."""
    words = [word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    actions = parser._option_string_actions
    return list(dict.fromkeys(actions[word].dest for word in words if word in actions))
