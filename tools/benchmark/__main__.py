"""Measure: python -m tools.benchmark similarity|step|evaluate|epoch|scale|search|photos|all …"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch loads, as in train.py

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.files import check_destination, write_json
from lib.flags import Parser
from lib.program import program, run_program
from tools.benchmark import report
from tools.benchmark.machine import circumstances
from tools.benchmark.measure import torch_device

COMMANDS = {  # and their modules: one is imported where it is asked for, as a library may lack
    "similarity": "similarity",
    "step": "step",
    "evaluate": "evaluate",
    "epoch": "epoch",
    "input": "input",
    "scale": "scale",
    "search": "search",
    "photos": "photos",
    "cached": "cached",
    "lengths": "lengths",
    "all": "whole",
}


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [argv[0]] if argv and argv[0] in COMMANDS else list(COMMANDS)
    return _measure(parser(names).parse_args(argv), argv)


def _measure(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = torch_device(args.device)
    if args.json:
        check_destination(args.json, "--json")
    module = module_of(args.command)
    found: dict[str, Any] = {
        **circumstances(device),
        "command": f"python -m tools.benchmark {shlex.join(argv)}",
        "rows": [],
    }
    for row in module.run(args):  # written as they come: a machine may be taken away
        found["rows"].append(row)
        if args.json:
            write_json(Path(args.json), found)
    print(getattr(module, "page", report.page)(found))
    if args.json:
        print(f"written to {args.json}")
    return 0


def parser(names: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser, a subcommand for each name. InputError where a library is missing."""
    whole = Parser("tools.benchmark", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        module = module_of(name)
        told = module.__doc__.strip().splitlines()[0]
        command = commands.add_parser(name, help=told, description=told)
        command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        command.add_argument("--json", default=None, metavar="F", help="also write the rows here")
        module.add_arguments(command)
    return whole


def module_of(name: str) -> Any:
    """Return a command's module. Raises InputError where a library that it needs is missing."""
    try:
        return importlib.import_module(f"tools.benchmark.{COMMANDS[name]}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"tools.benchmark {name} needs {error.name}, which is not installed; "
            "requirements.txt and requirements-extra.txt name the packages"
        ) from None


if __name__ == "__main__":
    run_program(main)
