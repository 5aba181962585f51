"""The import rules of the house, read off the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {"train", "eval", "arguments", "data", "vocab"}
METHOD_ROOM = {
    "lib.batch",
    "lib.encoders",
    "lib.slimming",
    "lib.gram",
    "lib.kernels",
    "lib.alignment",
    "lib.losses",
    "lib.pooling",
    "lib.graph",
    "lib.errors",
    "lib.methods.base",
    "lib.methods.registry",
}
ALLOWED = {  # local modules that a module may import; errors may be imported by all
    "lib.batch": set(),
    "lib.errors": set(),
    "lib.metrics": set(),
    "lib.encoders": {"lib.batch"},
    "lib.gram": set(),
    "lib.kernels": {"lib.alignment"},
    "lib.slimming": {"lib.batch", "lib.gram"},
    "lib.alignment": {"lib.batch"},
    "lib.losses": {"lib.batch"},
    "lib.distributed": {"lib.batch"},
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
    return {name for name in found if name.split(".")[0] in rooms and is_module(name)}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists()


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", modules("lib"), ids=name_of)
def test_lib_imports_no_top_level_module_and_no_tool(path):
    outside = {name for name in local_imports(path) if not name.startswith("lib")}
    assert outside == set()


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_lower_rooms(name):
    imports = local_imports(ROOT.joinpath(*name.split(".")).with_suffix(".py"))
    assert imports - ALLOWED[name] - {"lib.errors"} == set()


@pytest.mark.parametrize("path", modules("lib/methods"), ids=name_of)
def test_methods_never_import_each_other(path):
    if path.stem in ("__init__", "base", "registry"):
        return
    assert local_imports(path) - METHOD_ROOM == set()


def test_engine_and_similarity_see_methods_through_base():
    for name in ("engine", "similarity", "evaluation", "pictures"):
        imports = local_imports(ROOT / "lib" / f"{name}.py")
        assert {one for one in imports if one.startswith("lib.methods")} <= {"lib.methods.base"}


def test_data_is_no_package():
    assert not (ROOT / "data" / "__init__.py").exists()


def test_the_rules_can_fail(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from lib.methods import seps\n    import train\n")
    assert local_imports(path) == {"lib.methods.seps", "train"}
