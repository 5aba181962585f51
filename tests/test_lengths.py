"""How long files and functions of lib, the tools and the programs may be, read off the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "lib").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
)
LONGEST_FILE = 400
LONGEST_FUNCTION = 50
SHORTER = {"lib/methods/base.py": 199, "train.py": 250, "eval.py": 150}  # read to learn the house


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def long_functions(text: str) -> list[str]:
    """Functions and methods of more lines than a function may have, decorators aside."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions) and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]


def test_no_file_is_long():
    names = {path.relative_to(ROOT).as_posix(): path for path in SOURCES}
    assert set(SHORTER) <= set(names)
    found = {name: lines_of(path) for name, path in names.items()}
    assert {k: n for k, n in found.items() if n > SHORTER.get(k, LONGEST_FILE)} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_is_long(path):
    assert long_functions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("lines", "found"), [(50, []), (51, ["f: 51 lines"])])
def test_the_rule_can_fail(lines, found):
    body = "    x = 1\n" * (lines - 2)
    assert long_functions(f"class A:\n  @x\n  async def f():\n{body}    x = 2\n") == found
