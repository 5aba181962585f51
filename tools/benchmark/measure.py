"""Seconds, peak memory, and what the machine can do at most."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lib.errors import InputError
from lib.model import compiled
from lib.model.precision import DTYPES

MEBI = 2**20
PATIENCE = 0.2  # seconds of a product beyond which no larger one is tried
ROUNDS = 10**6  # of multiply-adds, some 5 to 20 ms
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STATUS = Path("/proc/self/status")


def add_measuring(
    parser: argparse.ArgumentParser, repeats: int = 3, clock: str | None = "wall"
) -> None:
    """Add the flags that say how is measured."""
    parser.add_argument("--repeats", type=int, default=repeats, help="the median of so many")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and lengths")
    parser.add_argument(
        "--amp",
        default=None,
        choices=["off", "bf16", "fp16"],
        help="arithmetic of both ways; default: off on the CPU, bf16 on CUDA",
    )
    parser.add_argument(
        "--clock",
        default=clock,
        choices=sorted(CLOCKS),
        help="cpu: the process's CPU seconds, which other work on the machine hardly touches; "
        "with one thread (OMP_NUM_THREADS=1), as threads that wait count too",
    )
    parser.add_argument("--memory", type=int, default=1, help="0: peak memory is not measured")
    parser.add_argument(
        "--roofline", type=int, default=1, help="0: the machine's own limits are not measured"
    )


def torch_device(name: str) -> torch.device:
    """Return the device. Raises InputError where there is no such one."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} usable CUDA devices; "
            "give --device cpu, or install a CUDA build of PyTorch"
        )
    return device


def amp_of(args: argparse.Namespace) -> str:
    """Return --amp, by default what suits the device."""
    return args.amp or ("off" if torch_device(args.device).type == "cpu" else "bf16")


def check_at_least_one(args: argparse.Namespace, *flags: str) -> None:
    """Raise InputError where one of the flags is below 1."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value}: give a whole number of at least 1")


def positive_list(text: str, flag: str) -> list[int]:
    """Return the numbers of a comma-separated list. Raises InputError naming the flag."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--{flag} {text}: give whole numbers of at least 1, as in 16,64,128")
    return [int(part) for part in parts]


def chosen_list(text: str, flag: str, known: tuple[str, ...]) -> list[str]:
    """Return the names of a comma-separated list. Raises InputError where one is not known."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in known:
            raise InputError(f"--{flag} {text}: {part!r} is not one of {', '.join(known)}")
    return parts


def chosen_one(text: str, flag: str, known: tuple[str, ...]) -> str:
    """Return the one name that is given. Raises InputError where there are several."""
    first, *others = chosen_list(text, flag, known)
    if others:
        raise InputError(f"--{flag} {text}: one at a time here; give {first} alone")
    return first


# --- seconds -------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], device: torch.device, clock: str = "wall") -> float:
    """Return how long one call takes by a clock of `CLOCKS`, the device's work included."""
    _finish(device)
    started = CLOCKS[clock]()
    call()
    _finish(device)
    return CLOCKS[clock]() - started


def side_by_side(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    clock: str = "wall",
    warm_up: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, float]:
    """Return each call's median seconds; the calls take turns, after one warm-up each.

    Taking turns, a disturbance of the machine hits both. `warm_up` has shorter calls for it.
    """
    for call in {**calls, **(warm_up or {})}.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device, clock))
    return {name: statistics.median(found) for name, found in seconds.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what the machine can do ---------------------------------------------------------------------


@cache
def peak_flops(device: torch.device, amp: str, clock: str = "wall") -> float:
    """Return the most floating-point operations a second that are reached here.

    Of a square product over some sizes; in float32 on the CPU also of multiply-adds in registers,
    which no library's product reaches.
    """
    dtype = DTYPES.get(amp, torch.float32)
    best = 0.0
    for side in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = _fastest(lambda a=left, b=right: a @ b, device, clock)
        best = max(best, 2 * side**3 / seconds)
        if seconds > PATIENCE:  # bf16 on a CPU without instructions for it
            break
    if device.type == "cpu" and dtype == torch.float32 and compiled.is_available():
        best = max(best, multiply_adds(clock))
    return best


def multiply_adds(clock: str) -> float:
    """Return the operations a second of multiply-adds in registers, a loop a thread."""
    function = compiled.library().multiply_adds
    function.restype = ctypes.c_int64  # how many operations that were
    job = ctypes.c_int64(ROUNDS), ctypes.c_float(0.5)
    done = torch.get_num_threads() * function(*job)
    jobs = [job] * torch.get_num_threads()
    return done / _fastest(lambda: compiled.run(function, jobs), torch.device("cpu"), clock)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second of copying a large array, reading and writing counted."""
    source = torch.ones((128 if device.type == "cpu" else 2048) * MEBI // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], Any], device: torch.device, clock: str = "wall") -> float:
    call()
    return min(seconds_of(call, device, clock) for _ in range(5))


def roofline(
    work: tuple[float, float],
    seconds: float,
    device: torch.device,
    amp: str,
    clock: str = "wall",
) -> dict[str, float]:
    """Return a row's "share" of the roofline and the two peaks, measured once in this process.

    The share is the least time that `work`, (operations, bytes), needs at these, over `seconds`.
    """
    flops, bandwidth = peak_flops(device, amp, clock), copy_bandwidth(device)
    share = max(work[0] / flops, work[1] / bandwidth) / seconds
    return {"share": share, "peak_flops": flops, "peak_bytes": bandwidth}


# --- memory --------------------------------------------------------------------------------------


def cuda_peak(call: Callable[[], Any], device: torch.device, added: bool = True) -> int:
    """Return the allocator's peak during a call in bytes, `added`: above what it held before."""
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if added else 0
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rss_peak(
    prepare: Callable[..., tuple[Callable, Callable]], *arguments: Any, added: bool = True
) -> int | None:
    """Return a call's peak RSS in a fresh process in bytes, `added`: above the RSS before it.

    `prepare(*arguments)` makes, in that process, a small call that loads what is loaded once, and
    the one to measure; it and its arguments are pickled. None where there is no /proc, or where the
    process was ended from outside (for want of memory).
    """
    if not STATUS.exists():
        return None
    # a server that has done nothing but import: its children are as fresh as spawned ones, sooner
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    child = context.Process(target=_measure_rss, args=(sender, threads, added, prepare, arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _measure_rss(
    sender: Any, threads: int, added: bool, prepare: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(threads)
    small, call = prepare(*arguments)
    small()
    with contextlib.suppress(OSError):  # else it is the peak of the process's life, no less
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS") if added else 0
    call()
    sender.send(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", STATUS.read_text(), re.MULTILINE)[1])


def free_memory(device: torch.device) -> float:
    """Return the bytes that can still be taken; infinity where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator holds back is free too
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    told = info.read_text() if info.exists() else ""
    found = re.search(r"^MemAvailable:\s+(\d+)", told, re.MULTILINE)
    return float("inf") if found is None else 1024.0 * int(found[1])
