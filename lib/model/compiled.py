"""The C files of this folder as one library, compiled at first use, and threads that call it.

Compiled for this processor into `$XDG_CACHE_HOME/seps`. Without a compiler, or with SEPS_NATIVE=0,
there is none and PyTorch serves; SEPS_NATIVE=avx2 leaves AVX-512 out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lib.errors import InputError

CHOICE = "SEPS_NATIVE"
# what -ffast-math allows, without its start-up code: that would flush denormals everywhere
LOOSE = """-fassociative-math -freciprocal-math -ffinite-math-only -fno-signed-zeros
-fno-trapping-math -fno-math-errno"""
FLAGS = ("-O3", "-march=native", *LOOSE.split(), "-fPIC", "-shared")
NARROWER = {"": (), "1": (), "avx2": ("-mno-avx512f",)}  # by value of CHOICE


def is_available() -> bool:
    """Return whether the C code is there: built now, or before by the same compiler."""
    return library() is not None


def library() -> ctypes.CDLL | None:
    """Return the library that the environment asks for, None where there is none.

    Raises InputError for a value that is not known.
    """
    choice = os.environ.get(CHOICE, "")
    if choice == "0":
        return None
    if choice not in NARROWER:
        raise InputError(f"{CHOICE}={choice}: known are 0 (PyTorch serves), 1 and avx2")
    return _loaded(NARROWER[choice])


@functools.cache
def _loaded(narrower: tuple[str, ...]) -> ctypes.CDLL | None:
    compiler = os.environ.get("CC", "cc")
    try:
        loaded = ctypes.CDLL(str(built(compiler, narrower)))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None  # no compiler, no place to write, no home folder: PyTorch serves
    return loaded


def built(compiler: str, narrower: tuple[str, ...] = ()) -> Path:
    """Return the shared library, compiled where this machine and compiler have none yet."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    files = sorted(Path(__file__).parent.glob("native*.[ch]"))
    texts = [text for file in files for text in (file.name, file.read_text())]
    flags = [*FLAGS, *narrower]
    known = "\0".join([*texts, version, *flags, _processor()])
    digest = hashlib.sha256(known.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(cache) / "seps" / f"native-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        sources = [str(file) for file in files if file.suffix == ".c"]
        command = [compiler, *flags, *sources, "-o", made, "-lm"]
        try:
            subprocess.run(command, capture_output=True, timeout=300, check=True)
            os.replace(made, target)  # whole or not at all, whoever else compiles
        finally:
            Path(made).unlink(missing_ok=True)
    return target


def _processor() -> str:
    """Return what tells processors apart: a library for one may not run on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{sys.platform} {platform.machine()} {platform.processor()} {flags}"


def shares(count: int) -> list[tuple[int, int]]:
    """Return first and last + 1 of each thread's share of `count`; threads as PyTorch has."""
    threads = max(1, min(torch.get_num_threads(), count))
    ends = [count * number // threads for number in range(threads + 1)]
    return list(itertools.pairwise(ends))


def call(name: str, jobs: Sequence[tuple]) -> None:
    """Call the library's function `name` with each job's arguments, a thread a job.

    Raises MemoryError where the function does not return 0.
    """
    if any(run(getattr(library(), name), jobs)):
        raise MemoryError(f"no memory for {name}")


def run(function: Callable, jobs: Sequence[tuple]) -> list[int]:
    """Return what a function of the library tells of each job, a thread a job.

    Arguments are ctypes values; ctypes lets go of the interpreter.
    """
    if len(jobs) == 1:
        return [function(*jobs[0])]
    return list(_pool(len(jobs)).map(lambda job: function(*job), jobs))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="native")
