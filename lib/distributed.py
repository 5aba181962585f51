"""Process group set-up, and gathers that carry gradient.

Every rank computes the same global loss from gathered rows. The backward pass of a gather adds up
what the ranks sent, so each rank holds `world` times its share of the gradient; averaging over the
ranks, as DistributedDataParallel does, then gives the gradient of one process on the global batch.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lib.batch import Tokens
from lib.errors import InputError


def world_size() -> int:
    """Return the number of processes, 1 outside distributed runs."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 outside distributed runs."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return True on the one process that writes files and prints."""
    return rank() == 0


def start(backend: str, url: str = "env://", world: int = -1, this_rank: int = -1) -> None:
    """Join the process group: from torchrun's environment, or from explicit `world`/`this_rank`.

    Raises InputError where the processes do not find each other.
    """
    if dist.is_initialized():
        return
    from_environment = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        dist.init_process_group(
            backend=backend,
            init_method="env://" if from_environment else url,
            world_size=-1 if from_environment else world,
            rank=-1 if from_environment else this_rank,
            timeout=timedelta(minutes=30),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes could not meet ({str(error).splitlines()[0]:.160}); start them with "
            "python -m torch.distributed.run, or give --dist_url tcp://HOST:PORT, --world_size "
            "and --rank"
        ) from None


def start_processes(
    multi_gpu: bool,
    gpu_id: int = 0,
    world: int = 1,
    this_rank: int = 0,
    local_rank: int = 0,
    backend: str = "nccl",
    url: str = "env://",
) -> torch.device:
    """Join the other processes where there are any; return this one's device.

    torchrun's environment goes before `world`, `this_rank` and `local_rank`; gloo takes the place
    of `backend` where there is no CUDA device. Raises InputError where the processes do not find
    each other, or the device is not there.
    """
    cuda = torch.cuda.is_available()
    if not multi_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torch.distributed.run started several processes: add --multi_gpu 1")
    if multi_gpu:
        if world > 1 or "RANK" in os.environ:
            start(backend if cuda else "gloo", url, world, this_rank)
        local_rank = int(os.environ.get("LOCAL_RANK", local_rank))
    if not cuda:
        if is_main():
            print("no CUDA device: running on the CPU")
        return torch.device("cpu")
    index = local_rank if multi_gpu else gpu_id
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


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


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
    )


def sum_over_ranks(counts: list[int], device: torch.device) -> list[int]:
    """Return each count added up over the ranks."""
    if world_size() == 1:
        return counts
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_true(flag: bool, device: torch.device) -> bool:
    """Return True where `flag` is True on every rank."""
    return sum_over_ranks([int(not flag)], device) == [0]


def gather_values(value: Any) -> list[Any]:
    """Return every rank's plain value, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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
