"""The one error that a user's mistake raises; the programs print it and exit with code 2."""

from __future__ import annotations


class InputError(ValueError):
    """A file, flag or folder that can't be used: one sentence with the way out."""
