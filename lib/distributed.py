"""Process group set-up, and gathers that carry gradient.

Every rank computes the same global loss from gathered rows. The backward pass of a gather adds up
what the ranks sent, so each rank holds `world` times its share of the gradient; averaging over the
ranks, as DistributedDataParallel does, then gives the gradient of one process on the global batch.
"""

from __future__ import annotations

import gc
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lib.batch import Tokens
from lib.errors import InputError, NonFiniteError, WorkerError
from lib.rendezvous import environment_integer, find_place, meet, peers_told

PATIENCE_SECONDS = 600.0  # how long processes wait for each other
LATE_SECONDS = 5.0  # that a file on a network disk may be seen late
ROWS_AT_ONCE = 256  # of a matrix that is gathered
Value = TypeVar("Value")


def world_size() -> int:
    """Return the number of processes, 1 outside distributed runs."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 outside distributed runs."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return True on the one process that writes files and prints."""
    return rank() == 0


def start(
    backend: str,
    url: str = "env://",
    world: int = -1,
    this_rank: int = -1,
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Join the process group: from torchrun's environment, or from explicit `world`/`this_rank`.

    `seconds` is how long processes wait for each other, here and later. Raises InputError where
    they do not find each other, after saying who is missing.
    """
    if dist.is_initialized():
        return
    place = find_place(url, world, this_rank)
    store = meet(place, seconds)
    limit = timedelta(seconds=seconds)
    with peers_told():
        try:
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world, timeout=limit
            )
        except ValueError as error:
            raise InputError(
                f"--dist_backend {backend}: {str(error).splitlines()[0]:.160}"
            ) from None


def start_processes(
    multi_gpu: bool,
    gpu_id: int = 0,
    world: int = 1,
    this_rank: int = 0,
    local_rank: int = 0,
    backend: str = "nccl",
    url: str = "env://",
    seconds: float = PATIENCE_SECONDS,
) -> torch.device:
    """Join the other processes where there are any; return this one's device.

    torchrun's environment goes before `world`, `this_rank` and `local_rank`; gloo takes the place
    of `backend` where there is no CUDA device. Raises InputError where the processes do not find
    each other, or the device is not there.
    """
    cuda = torch.cuda.is_available()
    asked = environment_integer("WORLD_SIZE")
    if not multi_gpu and asked is not None and asked > 1:
        raise InputError(
            f"WORLD_SIZE={asked} in the environment asks for {asked} processes: add --multi_gpu 1 "
            "where torch.distributed.run started them, or unset WORLD_SIZE for a single process"
        )
    if multi_gpu:
        given = environment_integer("LOCAL_RANK")
        local_rank = local_rank if given is None else given
    device = _take_gpu(local_rank if multi_gpu else gpu_id) if cuda else torch.device("cpu")
    told = dist.is_available() and dist.is_initialized()  # by an earlier call
    if multi_gpu and (world > 1 or environment_integer("RANK") is not None):
        start(backend if cuda else "gloo", url, world, this_rank, seconds)
    if not (cuda or told) and is_main():
        print("no CUDA device: running on the CPU")
    return device


def _take_gpu(index: int) -> torch.device:
    """Make a CUDA device this process's own, before NCCL guesses one. InputError without it."""
    if not 0 <= index < torch.cuda.device_count():
        raise InputError(
            f"--gpu-id {index}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return what a log calls the processes and their device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{world_size()} processes on {name}" if world_size() > 1 else name


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # DDP's cycles hold the group, whose threads must not outlast Python


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:  # NCCL would take the GPU of the rank's number, which need not be its own
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """Return every rank's `size`, in rank order."""
    if world_size() == 1:
        return [size]
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([size], device=device))
    return [int(one) for one in sizes]


def gather_rows(rows: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Return the rows of all ranks, (Σ B_r, …), with gradient back to the rank they came from.

    Ranks may hold different numbers of rows, not different trailing shapes. `sizes` spares the
    exchange of the row counts where the caller knows them.
    """
    if world_size() == 1:
        return rows
    sizes = gather_sizes(rows.shape[0], rows.device) if sizes is None else sizes
    if rows.dtype == torch.bool:
        return _GatherRows.apply(rows.to(torch.uint8), sizes).bool()
    return _GatherRows.apply(rows, sizes)


def gather_tokens(tokens: Tokens) -> Tokens:
    """Return the tokens of all ranks in rank order, padded to the longest on any rank."""
    if world_size() == 1:
        return tokens
    sizes = gather_sizes(len(tokens), tokens.local.device)
    width = max(gather_sizes(tokens.local.shape[1], tokens.local.device))
    even = tokens.padded(width)
    return Tokens(
        local=gather_rows(even.local, sizes),
        mask=gather_rows(even.mask, sizes),
        cls=None if even.cls is None else gather_rows(even.cls, sizes),
        dense=None if even.dense is None else gather_tokens(even.dense),
        fragments=None if even.fragments is None else gather_tokens(even.fragments),
        sentence=None if even.sentence is None else gather_rows(even.sentence, sizes),
    )


def broadcast_tokens(tokens: Tokens | None, source: int, device: torch.device) -> Tokens:
    """Return the tokens that rank `source` passes, on every rank; the others pass None."""
    shapes = None if tokens is None else _shapes(tokens.tensors())
    rows = tokens.tensors() if tokens is not None else None
    shapes = broadcast_value(shapes, source)
    return _filled_tokens(rows or _empty(shapes, device), source)


def _shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _shapes(one) if isinstance(one, dict) else (tuple(one.shape), one.dtype)
        for name, one in tensors.items()
    }


def _empty(shapes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _empty(one, device)
        if isinstance(one, dict)
        else torch.empty(one[0], dtype=one[1], device=device)
        for name, one in shapes.items()
    }


def _filled_tokens(tensors: dict[str, Any], source: int) -> Tokens:
    filled = {}
    for name, one in tensors.items():
        if isinstance(one, dict):
            filled[name] = _filled_tokens(one, source)
            continue
        one = one.contiguous()
        dist.broadcast(one.view(torch.uint8) if one.dtype == torch.bool else one, source)
        filled[name] = one
    return Tokens(**filled)


def rows_on_main(rows: Tensor, device: torch.device) -> Tensor | None:
    """Return the rows (R, N) of all ranks on the CPU of rank 0, None elsewhere.

    They travel over `device`, some at a time: the whole need not fit on it.
    """
    if world_size() == 1:
        return rows
    sizes = gather_sizes(rows.shape[0], device)
    parts: list[list[Tensor]] = [[] for _ in sizes]
    for first in range(0, max(sizes), ROWS_AT_ONCE):
        block = rows[first : first + ROWS_AT_ONCE].to(device)
        block = pad(block, (0, 0, 0, ROWS_AT_ONCE - len(block)))
        found = [torch.empty_like(block) for _ in sizes] if is_main() else None
        dist.gather(block, found)
        for part, size, one in zip(parts, sizes, found or [], strict=False):
            part.append(one[: max(0, size - first)].cpu())
    return torch.cat([one for part in parts for one in part]) if is_main() else None


def sum_over_ranks(counts: list[int], device: torch.device) -> list[int]:
    """Return each count added up over the ranks."""
    if world_size() == 1:
        return counts
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_values(value: Any) -> list[Any]:
    """Return every rank's plain value, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree(error: Exception | None) -> None:
    """Raise on every rank what went wrong on any: its own error, or the first rank's.

    Where one rank would raise alone, the others would wait for it for ever.
    """
    here = socket.gethostname()
    found = gather_values((error, here))
    if error is not None:
        raise error
    for source, (first, host) in enumerate(found):
        if first is not None:
            raise first if host == here else _told_from(first, source, host)


def _told_from(error: Exception, source: int, host: str) -> Exception:
    """Return an error of another machine with where it was: its files may not be this one's."""
    told = f"rank {source} on {host}: {error}"
    known = (InputError, NonFiniteError, WorkerError)
    return next((kind(told) for kind in known if isinstance(error, kind)), OSError(told))


@contextmanager
def together() -> Iterator[None]:
    """Let what goes wrong in the block on any rank be raised on every rank, at its end.

    Not for a block in which ranks wait for each other.
    """
    error = None
    try:
        yield
    except (InputError, NonFiniteError, WorkerError, OSError) as caught:
        error = caught
    agree(error)


def on_main(work: Callable[[], Value]) -> Value | None:
    """Do `work` on rank 0, which gets its value, others None; all raise its foreseen errors.

    Every rank waits until it is done.
    """
    value, error = None, None
    if is_main():
        try:
            value = work()
        except (OSError, InputError, NonFiniteError, WorkerError) as caught:
            error = caught
    agree(error)
    return value


def once_a_host(work: Callable[[], None]) -> None:
    """Do `work` on the first rank of each machine; all raise its foreseen errors.

    Rank 0's machine comes first: on a common disk the others then find it done.
    """
    here = socket.gethostname()
    hosts = gather_values(here)
    on_main(work)
    with together():
        if hosts[0] != here and hosts.index(here) == rank():
            work()


def hosts_without(folder: str | Path) -> list[str]:
    """Return the machines that do not see what rank 0 writes into `folder`; every rank calls it."""
    if world_size() == 1:
        return []
    mark = Path(folder) / broadcast_value(f".seen_{uuid.uuid4().hex}")
    on_main(lambda: mark.touch())
    seen = gather_values((socket.gethostname(), _appears(mark)))
    on_main(lambda: mark.unlink(missing_ok=True))
    return list(dict.fromkeys(host for host, there in seen if not there))


def _appears(path: Path) -> bool:
    """Return whether a file is there, now or within what a network disk may be behind."""
    deadline = time.monotonic() + LATE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def broadcast_value(value: Any, source: int = 0) -> Any:
    """Return the plain value of rank `source` on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        room = (0, 0) * (rows.dim() - 1) + (0, longest - rows.shape[0])
        padded = pad(rows, room).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        first = sum(ctx.sizes[: rank()])
        return gradient[first : first + ctx.sizes[rank()]], None
