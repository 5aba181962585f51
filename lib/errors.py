"""The errors that the programs turn into one sentence and an exit code, and the warnings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, flag or folder that can't be used: one sentence with the way out. Exit code 2.

    It is one line whatever it quotes.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(" ".join(str(sentence).splitlines()))


class NonFiniteError(RuntimeError):
    """A loss, gradient norm or similarity that is not finite, with where it was. Exit code 3."""


class WorkerError(RuntimeError):
    """A loader worker that ended, or can't hand over its batch. Exit code 1."""


class PeerError(RuntimeError):
    """Another process of a distributed run that ended or does not answer. Exit code 1."""


class InputWarning(UserWarning):
    """Input that can be used but is likely a mistake: one sentence with counts."""


@contextmanager
def as_input_error(sentence: str) -> Iterator[None]:
    """Turn whatever is raised within into InputError: `sentence`, and its first line in brackets.

    For the calls into other libraries with a file from outside: what a damaged file, or one of
    another kind, makes them raise is not ours to list. An InputError passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # RecursionError and MemoryError among them
        raise InputError(f"{sentence} ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, 160 characters at most; its type without one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
