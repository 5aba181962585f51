"""Packages that only some features need: imported where used, one sentence where missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from lib.errors import InputError


def need(module: str, package: str, purpose: str) -> ModuleType:
    """Return the imported `module` of `package`; InputError, saying what for, where it is not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs the package {package}: pip install {package} ({error})"
        ) from None
