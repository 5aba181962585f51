"""Full similarity matrix of a split: everything encoded once, scored in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from lib.batch import Batch, Tokens
from lib.distributed import (
    broadcast_tokens,
    gather_values,
    rank,
    rows_on_main,
    together,
    world_size,
)
from lib.methods.base import Method

TEXTS_AT_ONCE = 1024  # captions scored per call: bounds padding, and what lies on the device

Progress = Callable[[int], None]


def shard(count: int, this_rank: int | None = None, world: int | None = None) -> range:
    """Return the consecutive indices that a rank works on, of `count` in all."""
    this_rank = rank() if this_rank is None else this_rank
    world = world_size() if world is None else world
    return range(count * this_rank // world, count * (this_rank + 1) // world)


def encode_batches(
    encode: Callable[[Batch], Tokens],
    batches: Iterable[Batch],
    device: torch.device,
    autocast: Callable,
    progress: Progress = lambda count: None,
) -> list[Tokens]:
    """Return the tokens of each batch of images or captions, on `device`; each is encoded once."""
    tokens = []
    for one in encoded(encode, batches, device, autocast):
        tokens.append(one)
        progress(len(one))
    return tokens


@torch.inference_mode()
def encoded(
    encode: Callable[[Batch], Tokens],
    batches: Iterable[Batch],
    device: torch.device,
    autocast: Callable,
) -> Iterator[Tokens]:
    """Yield the tokens of each batch as it comes, so that the caller may hold one at a time."""
    for batch in batches:
        with autocast():
            tokens = encode(batch.to(device))
        yield tokens


@torch.inference_mode()
def gathered_texts(parts: list[Tokens], device: torch.device) -> Iterator[Tokens]:
    """Yield every rank's captions in groups, in rank order, on every rank; a rank may have none.

    A group is padded to its own longest caption, and the ranks hold one of the others' at a time.
    """
    mine = regroup(parts, TEXTS_AT_ONCE)
    if world_size() == 1:
        yield from mine
        return
    for source, count in enumerate(gather_values(len(mine))):
        for index in range(count):
            group = mine[index] if source == rank() else None
            yield broadcast_tokens(group, source, device)


def regroup(parts: list[Tokens], size: int) -> list[Tokens]:
    """Return the same rows in groups of about `size`, whole parts only."""
    groups, current, count = [], [], 0
    for part in parts:
        current.append(part)
        count += len(part)
        if count >= size:
            groups.append(_joined(current))
            current, count = [], 0
    return groups + ([_joined(current)] if current else [])


def _joined(parts: list[Tokens]) -> Tokens:
    return parts[0] if len(parts) == 1 else Tokens.cat(parts)  # cat copies


@torch.inference_mode()
def similarity_matrix(
    model: Method,
    images: Iterable[Tokens],
    texts: Iterable[Tokens],
    autocast: Callable,
    count: int,
    progress: Progress = lambda count: None,
    device: torch.device | str = "cpu",
    done: Sequence[np.ndarray] = (),
    keep: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray | None:
    """Return the similarity of all ranks' images with all captions, (N_images, N_captions) float32.

    `images` are this rank's, `count` at most, in parts that are taken one by one; `texts` are all
    captions, in groups. `done` are this rank's rows before those, already scored; `keep` is called
    with each new block of rows and its first row. Rank 0 returns the whole matrix, others None;
    what goes wrong on one rank is raised on all.
    """
    with autocast():
        groups = [model.bucketed(group) for group in texts]
    rows = np.empty(
        (count, sum(map(len, groups))), np.float32
    )  # one piece: it is taken as it fills
    first = 0
    for block in done:
        rows[first : first + len(block)] = block
        first += len(block)
    with together():
        for part in images:
            block = rows[first : first + len(part)]
            with autocast():
                prepared = model.prepare_images(part)  # once an image
                maps = (model.prepared_maps(prepared, group) for group in groups)
                columns = [one["similarity"].float() for one in maps]
            block[:] = torch.cat(columns, dim=1).cpu().numpy()  # the device is waited for once
            if keep is not None:
                keep(first, block)
            first += len(block)
            progress(block.size)
    whole = rows_on_main(torch.from_numpy(rows[:first]), device)
    return None if whole is None else whole.numpy()
