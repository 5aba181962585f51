"""The errors that the programs turn into one sentence and an exit code."""

from __future__ import annotations


class InputError(ValueError):
    """A file, flag or folder that can't be used: one sentence with the way out. Exit code 2."""


class NonFiniteError(RuntimeError):
    """A loss, gradient norm or similarity that is not finite, with where it was. Exit code 3."""
