"""The command line of every program: ranges, defaults, lists, warnings; the field's own lines."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

import eval as evaluation
import train
from arguments import eval_parser, parse_eval, parse_train, train_parser, warn_of_unread_flags
from lib.errors import InputError, InputWarning
from lib.flags import IntegerList, Parser, check_kinds
from lib.methods import registry
from lib.methods.flags import SLIMMING_FLAGS
from lib.ranges import RANGES, check_ranges
from tests.helpers import VOCABULARY, tiny_args

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ROOT.parent / "shared" / "seeds"


def tools() -> dict[str, ModuleType]:
    """Every module of tools/ that is a program, and every package's __main__."""
    paths = [*(ROOT / "tools").glob("*.py"), *(ROOT / "tools").glob("*/__main__.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths)]
    modules = {name: importlib.import_module(name) for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "main")}


TOOLS = tools()
PARSERS = {
    "train": train_parser,
    "eval": eval_parser,
    **{name: module.parser for name, module in TOOLS.items()},
}
MAINS = {
    "train": train.main,
    "eval": evaluation.main,
    **{name: module.main for name, module in TOOLS.items()},
}


def every_parser(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [one for sub in action.choices.values() for one in every_parser(sub)]
    return found


def flags_of(name: str) -> list[argparse.Action]:
    return [one for parser in every_parser(PARSERS[name]()) for one in parser._actions]


@pytest.mark.parametrize("name", PARSERS)
def test_every_number_has_its_range_in_the_table(name):
    """A flag that takes numbers and fails here belongs into lib/ranges.py."""
    numbers = [
        one.dest
        for one in flags_of(name)
        if one.type in (int, float) or isinstance(one, IntegerList)
    ]
    assert [one for one in numbers if one not in RANGES] == []


@pytest.mark.parametrize("name", PARSERS)
def test_help_has_80_columns_and_every_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for parser in every_parser(PARSERS[name]()):
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= 80
        for action in parser._actions:
            silent = action.required or action.nargs == 0 or not action.option_strings
            told = parser._get_formatter()._get_help_string(action)
            assert silent or "default" in told, action.dest
            assert action.help or action.required, action.dest


@pytest.mark.parametrize("name", MAINS)
def test_help_and_a_mistyped_flag_have_exit_codes(name, capsys):
    assert MAINS[name](["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert MAINS[name](["--no_such_flag", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_flags_are_not_abbreviated_and_alike_ones_are_named():
    with pytest.raises(InputError, match="--batch: no such flag"):
        parse_train(["--batch", "3"])
    with pytest.raises(InputError, match="did you mean --num_epochs"):
        parse_train(["--num_epoch", "3"])


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["9", "15", "20", "25"], [9, 15, 20, 25]),
        (["9,15,20,25"], [9, 15, 20, 25]),
        (["[9, 15]"], [9, 15]),
        (["9,15", "20"], [9, 15, 20]),
        ([""], []),
    ],
)
def test_lists_are_several_values_or_one_word(words, value):
    assert parse_train(["--lr_schedules", *words]).lr_schedules == value


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("batch_size", "0", "a whole number of at least 1"),
        ("batch_size", "99999999999", "at most 2,147,483,647"),
        ("learning_rate", "nan", "a number above 0"),
        ("weight_decay", "inf", "a number of at least 0"),
        ("sparse_ratio", "1.5", r"a number in \(0, 1\]"),
        ("multi_gpu", "4", "0 or 1"),
        ("lr_schedules", "-1", "a whole number of at least 0"),
        ("gpu-id", "-1", "a whole number of at least 0"),
        ("seed", "-1", "a whole number of at least 0"),
    ],
)
def test_values_out_of_range_are_told(flag, value, told):
    with pytest.raises(InputError, match=f"--{flag} {value}: give {told}"):
        parse_train([f"--{flag}={value}"])


def test_eval_has_the_same_ranges_and_only_what_it_reads():
    with pytest.raises(InputError, match="--batch_size 0: give"):
        parse_eval(["--batch_size", "0"])
    with pytest.raises(InputError, match="--size_augment: no such flag"):
        parse_eval(["--size_augment", "0"])


def test_booleans_and_none_are_no_numbers_to_check():
    check_ranges({"shard_size": None, "max_violation": True})
    with pytest.raises(InputError, match=r"args\.json: --topk 0"):
        check_ranges({"topk": 0}, "args.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "64"),
        ("batch_size", 1.5),
        ("batch_size", None),
        ("loss", "other"),
        ("margin", "0.2"),
        ("lr_schedules", 9),
        ("lr_schedules", ["9"]),
        ("max_violation", 1),
        ("logger_name", 7),
    ],
)
def test_values_of_another_kind_in_a_file_are_told(name, value):
    with pytest.raises(InputError, match=rf"args\.json: .*{name}"):
        check_kinds(train_parser()._actions, {name: value}, "args.json")


def test_values_of_a_file_that_fit_pass():
    kept = {**vars(parse_train([])), "of_a_later_version": object()}
    check_kinds(train_parser()._actions, kept, "args.json")


# --- flags of other methods --------------------------------------------------------------------


def test_flags_that_only_other_methods_read_are_warned_of():
    argv = ["--sparse_ratio=0.8", "--mask_weight", "1", "--margin", "0.1"]
    with pytest.warns(InputWarning, match="--sparse_ratio, --mask_weight are not read by .* vse"):
        warn_of_unread_flags(argv, "vse")
    with pytest.warns(InputWarning, match="--mask_weight is not read by --method laps"):
        warn_of_unread_flags(argv, "laps")


class Recorder(argparse.Namespace):
    """Arguments that note which of them are read one by one."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("method", registry.method_names())
def test_a_method_reads_what_it_says(method):
    args = Recorder(**vars(tiny_args(method)))
    args.method  # noqa: B018, begins the record
    registry.build_model(args, VOCABULARY)
    read = vars(args)["_read"]
    assert read & registry.flags_unread(method) == set()
    shared = {
        *SLIMMING_FLAGS,
        "attention_weight",
        "dense_match",
        "match_weight",
        "match_gate",
    }  # others are read elsewhere too
    assert set(registry.get_method(method).also_reads) & shared == read & shared


def test_the_embedded_parser_can_exit_with_2(capsys):
    parser = Parser("tool")
    parser.add_argument("--topk", type=int, default=1)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--topk", "0"])
    assert caught.value.code == 2
    assert "--topk 0: give" in capsys.readouterr().err


# --- lines of the field's repositories ---------------------------------------------------------


def field_lines() -> list[tuple[str, str]]:
    """(repository, line) for each command of the READMEs in shared/seeds."""
    found = []
    for path in sorted(SEEDS.glob("*_readme.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if re.search(r"python\b.*\b(train|eval)\.py +-", line):
                found.append((path.name.removesuffix("_readme.md"), line.strip()))
    return found


ADDED = {"avse": "avse", "hrem": "hrem", "improved_laps": "ilaps", "laps": "laps", "seps": "seps"}


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the READMEs of the field are not here")
def test_every_line_of_the_fields_readmes_parses_as_written():
    lines = field_lines()
    assert {name for name, _ in lines} == set(ADDED)
    assert len(lines) > 30
    for name, line in lines:
        words = shlex.split(line)
        place = next(i for i, word in enumerate(words) if word.endswith((".py",)))
        argv = words[place + 1 :]
        if words[place] == "eval.py":
            parse_eval(argv)
            continue
        args = parse_train([*argv, "--method", ADDED[name]])
        for flag, value in zip(argv[::2], argv[1::2], strict=True):
            kept = getattr(args, flag.lstrip("-").replace("-", "_"))
            assert kept == type(kept)(value), line
