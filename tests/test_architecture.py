"""docs/architecture.md draws the imports as they are; the README's method trains and evaluates."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType

import pytest

import eval as evaluation
import train
from lib.methods import registry
from tests.test_imports import ROOT, TOP_LEVEL, WINGS, local_imports, modules


def room_of(name: str) -> str | None:
    """The box of the diagram that a module lies in; None for the ground floor and the tests."""
    first, *rest = name.split(".")
    if first in TOP_LEVEL:
        return f"{first}.py"
    if first == "tools":
        return "tools"
    return f"lib/{rest[0]}" if first == "lib" and rest and rest[0] in WINGS else None


def arrows_of_the_code() -> set[tuple[str, str]]:
    files = [*modules("lib"), *modules("tools"), *(ROOT / f"{name}.py" for name in TOP_LEVEL)]
    found = set()
    for path in files:
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        found.update((here, room_of(name)) for name in local_imports(path))
    return {(one, other) for one, other in found if one and other and one != other}


def test_the_diagram_has_the_imports_of_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    diagram = re.search(r"```mermaid\n(.*?)```", text, re.S)[1]
    drawn = set(re.findall(r"^\s*(\S+) --> (\S+)$", diagram, re.M))
    assert drawn == arrows_of_the_code()


def test_every_file_that_the_walk_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(lib/[\w/]+\.py)`", text))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.fixture
def example(monkeypatch):
    """The README's method, registered for one test."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Add a method")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    module = ModuleType("lib.methods.mean_patch")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "README.md", "exec"), vars(module))
    return "mean_patch"


def test_the_method_of_the_readme_trains_and_evaluates(example, tmp_path, capsys):
    data = ["--dataset", "scenes", "--data_path", str(tmp_path), "--scenes_size", "64,8,8"]
    small = ["--tiny_width", "16", "--embed_size", "16", "--workers", "0", "--batch_size", "64"]
    run = tmp_path / "run"
    argv = [*data, *small, "--num_epochs", "1", "--logger_name", str(run), "--max_violation"]
    assert train.main(["--method", example, *argv]) == 0  # 5 steps
    assert "5 steps an epoch" in capsys.readouterr().out
    where = ["--data_path", str(tmp_path), "--workers", "0"]
    assert evaluation.main(["--checkpoint", str(run / "model_best.pth"), *where]) == 0
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert all(table["method"] == example for table in results.values())
