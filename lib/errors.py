"""The errors that the programs turn into one sentence and an exit code."""

from __future__ import annotations


class InputError(ValueError):
    """A file, flag or folder that can't be used: one sentence with the way out. Exit code 2."""


class NonFiniteError(RuntimeError):
    """A loss, gradient norm or similarity that is not finite, with where it was. Exit code 3."""


class WorkerError(RuntimeError):
    """A loader worker that ended, or can't hand over its batch. Exit code 1."""


class PeerError(RuntimeError):
    """Another process of a distributed run that ended or does not answer. Exit code 1."""
