"""The import rules of the house, wing by wing, read off the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {"train", "eval", "arguments", "data", "scoring", "sharding", "vocab"}
GROUND = {
    f"lib.{name}"
    for name in """errors ranges flags memory batch config_file distributed files program
    rendezvous""".split()
}
CONTRACT = {"lib.methods", "lib.methods.base", "lib.methods.registry"}
FAMILIES = {"laps_family", "pooled", "sgraf_family", "d2s_family"}
SHARED_BY_METHODS = {"pairs", "flags", "options", "encoder_flags"} | FAMILIES  # beside the contract
WINGS = {  # what a wing may import beside the ground floor and itself
    "data": set(),
    "model": set(),
    "methods": {"lib.model"},
    "retrieval": {"lib.model", *CONTRACT},
    "checkpoints": {"lib.model", *CONTRACT},
    "training": {"lib.model", "lib.retrieval", "lib.checkpoints", *CONTRACT},
}
GROUND_MAY = {  # of the ground floor, who may import whom
    "lib.errors": set(),
    "lib.batch": {"lib.errors"},
    "lib.files": {"lib.errors"},
    "lib.ranges": {"lib.errors"},
    "lib.flags": {"lib.errors", "lib.ranges"},
    "lib.memory": {"lib.errors"},
    "lib.rendezvous": {"lib.errors"},
    "lib.distributed": {"lib.errors", "lib.batch", "lib.rendezvous"},
    "lib.config_file": {"lib.errors", "lib.files"},
    "lib.program": {"lib.errors"},
}


def local_imports(path: Path) -> set[str]:
    """Names of the local modules that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    rooms = {"lib", "tools", "tests"} | TOP_LEVEL
    names = {name for name in found if name.split(".")[0] in rooms and is_module(name)}
    # `from lib.methods import registry` names the package and the module: the module counts
    return {one for one in names if not any(other.startswith(f"{one}.") for other in names)}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("path", modules("lib"), ids=name_of)
def test_lib_imports_no_top_level_module_and_no_tool(path):
    outside = {name for name in local_imports(path) if not name.startswith("lib")}
    assert outside == set()


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_floor_imports_nothing_above_it(name):
    imports = local_imports(ROOT.joinpath(*name.split(".")).with_suffix(".py"))
    assert imports <= GROUND_MAY[name]


def test_every_folder_of_lib_is_a_wing_and_every_file_on_the_ground_floor_is_known():
    folders = {path.name for path in (ROOT / "lib").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(WINGS)
    files = {f"lib.{path.stem}" for path in (ROOT / "lib").glob("*.py")} - {"lib.__init__"}
    assert files == GROUND


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_wing_imports_what_lies_before_it(wing):
    for path in modules(f"lib/{wing}"):
        allowed = {*GROUND, f"lib.{wing}"} | (WINGS[wing] - CONTRACT)
        strange = {
            name
            for name in local_imports(path)
            if not within(name, allowed) and name not in WINGS[wing]
        }
        assert strange == set(), name_of(path)


@pytest.mark.parametrize("path", modules("lib/methods"), ids=name_of)
def test_methods_never_import_each_other(path):
    if path.stem == "__init__":
        return
    allowed = CONTRACT | {f"lib.methods.{one}" for one in SHARED_BY_METHODS}
    strange = {one for one in local_imports(path) if within(one, {"lib.methods"})} - allowed
    assert strange == set()


def test_programs_are_roots_that_nobody_imports():
    for path in [*modules("tools"), *(ROOT / f"{name}.py" for name in TOP_LEVEL)]:
        assert not local_imports(path) & {"train", "eval"}, name_of(path)


def test_data_is_no_package():
    assert not (ROOT / "data" / "__init__.py").exists()


def test_the_rules_can_fail(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from lib.methods import seps\n    import train\n")
    assert local_imports(path) == {"lib.methods.seps", "train"}
