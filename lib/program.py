"""What every program does around its main: each foreseen error is one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import TracebackType

from lib.errors import (
    InputError,
    InputWarning,
    NonFiniteError,
    PeerError,
    WorkerError,
    first_line,
)

Main = Callable[[Sequence[str] | None], int]
INTERRUPTED = 130  # what a shell reports after Ctrl-C
WAY_OUT_OF_MEMORY = (
    "a smaller --batch_size or --shard_size needs less, so do --gradient_checkpointing 1 and "
    "--amp bf16"
)


def program(main: Main) -> Main:
    """Return `main` with every foreseen error told on stderr and turned into its exit code.

    0: done, 1: the system failed it (disk, memory, a process), 2: bad input, 3: not finite,
    130: interrupted. What is not foreseen passes through.
    """

    @wraps(main)
    def told(argv: Sequence[str] | None = None) -> int:
        printable_streams()
        try:
            with warnings_told():
                return main(argv)
        except SystemExit as error:  # of a parser
            return error.code if isinstance(error.code, int) else 2
        except KeyboardInterrupt:
            print("stopped; what was written before is whole", file=sys.stderr)
            return INTERRUPTED
        except (InputError, NonFiniteError, WorkerError, PeerError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return _exit_code(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print(
                f"error: out of memory ({first_line(error)}); {WAY_OUT_OF_MEMORY}", file=sys.stderr
            )
            return 1

    return told


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for what Python, torch on the CPU and CUDA raise where memory runs out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


def run_program(main: Main) -> None:
    """Run a program from the command line, and exit."""
    code = main(None)
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the interpreter ends
    sys.exit(code)


def prepare_terminal() -> None:
    """Let neither Ctrl-C nor a character that the terminal lacks end the program in a traceback.

    For the first line of a program: it holds while the libraries load, too.
    """
    printable_streams()
    sys.excepthook = _told_once


def printable_streams() -> None:
    """Let stdout and stderr write a character that their encoding lacks as its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def warnings_told(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within, tell each different InputWarning once, in one line; `say` takes stderr's place.

    Other warnings are shown as ever. Of several processes only that of rank 0 tells them.
    """
    told: set[str] = set()
    before = warnings.showwarning

    def show(message, category, *place, **settings) -> None:
        if not issubclass(category, InputWarning):
            before(message, category, *place, **settings)
        elif str(message) not in told and os.environ.get("RANK", "").strip() in ("", "0"):
            told.add(str(message))
            tell = say or (lambda text: print(text, file=sys.stderr))
            tell(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = show
        yield


def _told_once(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, where)


def _exit_code(error: Exception) -> int:
    if isinstance(error, InputError):
        return 2
    return 3 if isinstance(error, NonFiniteError) else 1
