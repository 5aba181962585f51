"""Evaluation of a gallery of any size in the files of one folder, by any number of processes.

Three kinds of files: `texts`, a group of captions encoded; `own`, what the captions of a block of
images score with their own image; `counts`, what a block of images adds to all ranks. Each is made
by one process from the kinds before it; scores are counted as they come and kept nowhere. The model
is called as in `similarity.similarity_matrix`, on the same batches and groups, so that the ranks
are the same to the last tie.

Rows of the matrix would take 4 bytes a pair: 20 TB for a million images and five million captions.
Counts take 2 bytes a caption and block, but need every caption's own score first; for those each
image is encoded twice, and scored with the groups of its captions once more.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.batch import Rows
from lib.distributed import broadcast_value, on_main, together
from lib.errors import NonFiniteError
from lib.methods.base import Method
from lib.retrieval.claims import RESULT, holders, share_out, wait_for_group
from lib.retrieval.counts import Arrays, BlockCounts, OwnScores, RankSum
from lib.retrieval.evaluation import Carried, SplitLoaders
from lib.retrieval.metrics import QueryRanks
from lib.retrieval.progress import progress_bar
from lib.retrieval.shard_files import (
    arrays_tokens,
    read_arrays,
    read_facts,
    token_arrays,
    write_arrays,
)
from lib.retrieval.similarity import TEXTS_AT_ONCE, encoded, regroup

TEXTS, OWN, COUNTS = "texts", "own", "counts"
UNITS = {TEXTS: "captions", OWN: "own pairs", COUNTS: "pairs"}  # what the progress bars count
Progress = Callable[[int], None]
Clocks = tuple[float, float]


@dataclass(frozen=True)
class Merged:
    """What all files of a folder say together."""

    ranks: dict[str, QueryRanks]  # by name of the result
    carried: tuple[bool, bool]  # a dense text beside images; beside captions
    stages: dict[str, dict[str, float]]  # by kind: files, bytes, seconds of all processes together
    hosts: list[str]


class ShardedEvaluation:
    """One process's part in an evaluation whose files lie in `folder`.

    `batch_size` is that of the loaders, which hold the whole split; `block` the images of a file,
    rounded up to whole batches; `names` are the results with their folds. Every rank makes one.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Method,
        loaders: SplitLoaders,
        device: torch.device,
        autocast: Callable,
        names: dict[str, int],
        batch_size: int,
        block: int,
    ) -> None:
        self.folder = Path(folder)
        self.group = broadcast_value(uuid.uuid4().hex)  # marks claims of processes started together
        self.model, self.loaders = model.eval(), loaders
        self.device, self.autocast, self.names = device, autocast, names
        owners = np.asarray(loaders.caption_images)
        self.owners, self.images, self.captions = owners, loaders.num_images, len(owners)
        self.batch_size = batch_size
        self.text_group = -(-TEXTS_AT_ONCE // batch_size) * batch_size
        self.block = -(-block // batch_size) * batch_size
        self.order = np.argsort(owners, kind="stable")  # captions, image after image
        self.starts = np.searchsorted(owners[self.order], np.arange(self.images + 1))
        self._own: OwnScores | None = None

    def run(self) -> None:
        """Make what is missing and nobody else makes; wait where what follows needs it."""
        works = {TEXTS: self._encode_texts, OWN: self._score_own, COUNTS: self._count}
        for kind, work in works.items():
            self._share_out(kind, work)
        wait_for_group(self.folder / COUNTS, self.group)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the files' contents and bits depend on beside model and data."""
        return {
            "batch_size": self.batch_size,
            "shard_images": self.block,
            "shard_size": self.model.shard_size,
            "results": self.names,
        }

    def finished(self) -> Merged | None:
        """Return what all files make after this process's part; None while others are at theirs.

        Every rank of a distributed run calls it; what fails on one is raised on all. Damaged files
        are made anew.
        """
        for _ in range(2):  # again where the first time showed damage
            with together():
                self.run()
            if not broadcast_value(self._all_there()):
                return None
            found = broadcast_value(on_main(self.merged))
            if found is not None:
                return found
        return None

    def _all_there(self) -> bool:
        there = set(os.listdir(self.folder / COUNTS))
        return all(name + RESULT in there for name in self._pieces(COUNTS))

    def merged(self) -> Merged | None:
        """Return what all files make together; None where one is damaged: it is removed."""
        sums = {name: RankSum(self.owners, folds) for name, folds in self.names.items()}
        for piece in self._pieces(COUNTS).values():
            found = read_arrays(self._path(COUNTS, piece))
            if found is None:
                return None
            for name, one in sums.items():
                mine = {k: v for k, v in found[0].items() if k.startswith(f"{name}.")}
                one.add({key.removeprefix(f"{name}."): value for key, value in mine.items()})
        paths = {
            kind: [self._path(kind, piece) for piece in self._pieces(kind).values()]
            for kind in UNITS
        }
        read = {kind: [read_facts(path) for path in paths[kind]] for kind in UNITS}
        facts = {kind: [one for one in read[kind] if one is not None] for kind in UNITS}
        if facts != read:
            return None
        every = [one for kind in UNITS for one in facts[kind]]
        stages = {
            kind: {
                "files": len(paths[kind]),
                "bytes": sum(path.stat().st_size for path in paths[kind]),
                "seconds": round(sum(one["seconds"] for one in facts[kind]), 2),
                "cpu_seconds": round(sum(one["cpu_seconds"] for one in facts[kind]), 2),
            }
            for kind in UNITS
        }
        return Merged(
            ranks={name: one.ranks() for name, one in sums.items()},
            carried=tuple(any(one["carried"][side] for one in every) for side in (0, 1)),
            stages=stages,
            hosts=sorted({one["host"] for one in every}),
        )

    def told(self) -> str:
        """Return a line that says what is there, where not everything is."""
        pieces = self._pieces(COUNTS).values()
        done = sum(self._path(COUNTS, piece).exists() for piece in pieces)
        return (
            f"{self.folder}: {done} of {len(pieces)} blocks of images are done, the others are "
            f"under way ({holders(self.folder / COUNTS)}): the last process to end prints the "
            "table, and so does this command once more"
        )

    # --- pieces of work and their files

    def _pieces(self, kind: str) -> dict[str, range]:
        """Return the captions or images of each file of a kind, by the file's name."""
        count, size = (
            (self.captions, self.text_group) if kind == TEXTS else (self.images, self.block)
        )
        return {
            f"{first:09d}": range(first, min(first + size, count))
            for first in range(0, count, size)
        }

    def _path(self, kind: str, piece: range) -> Path:
        return self.folder / kind / f"{piece.start:09d}{RESULT}"

    def _share_out(self, kind: str, work: Callable[[range, Progress], None]) -> None:
        pieces = self._pieces(kind)
        whole = len(next(iter(pieces.values())))
        each = self.captions if kind == COUNTS else 1
        total = each * (self.captions if kind == TEXTS else self.images)
        with progress_bar(UNITS[kind], total) as bar, torch.inference_mode():
            share_out(
                self.folder / kind,
                list(pieces),
                lambda name: work(pieces[name], bar.update),
                wait=kind != COUNTS,
                group=self.group,
                listed=lambda done: bar.update(min(total, done * whole * each) - bar.n),
            )

    def _write(
        self, kind: str, piece: range, arrays: Arrays, carried: Carried, started: Clocks
    ) -> None:
        passed = [now - then for now, then in zip(_clocks(), started, strict=True)]
        facts = {
            "carried": [carried.images, carried.captions],
            "seconds": passed[0],
            "cpu_seconds": passed[1],
            "host": socket.gethostname(),
        }
        write_arrays(self._path(kind, piece), arrays, facts)

    def _read(self, kind: str, piece: range) -> Arrays:
        """Return a file's arrays; one that was damaged meanwhile is made anew."""
        path, work = self._path(kind, piece), {TEXTS: self._encode_texts, OWN: self._score_own}
        found = read_arrays(path)
        if found is None:
            work[kind](piece, lambda count: None)
            found = read_arrays(path)
        if found is None:
            raise OSError(f"{path} can't be read although it was just written: is the disk whole")
        return found[0]

    # --- the work

    def _encode_texts(self, piece: range, progress: Progress) -> None:
        started, carried = _clocks(), Carried()
        batches = carried.watch("captions", self.loaders.captions.only(piece))
        parts = []
        for part in encoded(self.model.encode_text_batch, batches, self.device, self.autocast):
            parts.append(part)
            progress(len(part))
        (group,) = regroup(parts, self.text_group)
        self._write(TEXTS, piece, token_arrays(group), carried, started)

    def _score_own(self, piece: range, progress: Progress) -> None:
        started, carried = _clocks(), Carried()
        prepared = self._prepared(piece, carried)
        mine = self._captions_of(piece.start, piece.stop)
        right = np.empty(self.captions, np.float32)
        groups = [
            group
            for group in self._pieces(TEXTS).values()
            if np.any((mine >= group.start) & (mine < group.stop))
        ]
        for group, texts in self._groups(groups):
            for row, images in prepared:
                ours = self._captions_of(row, row + len(images))
                ours = ours[(ours >= group.start) & (ours < group.stop)]
                if len(ours):
                    scores = self._scores(images, texts, row)
                    right[ours] = scores[self.owners[ours] - row, ours - group.start]
        self._write(OWN, piece, {"right": right[mine]}, carried, started)
        progress(len(piece))

    def _count(self, piece: range, progress: Progress) -> None:
        started, carried = _clocks(), Carried()
        own = self._own_scores()
        counts = {
            name: BlockCounts(own, piece.start, piece.stop, folds)
            for name, folds in self.names.items()
        }
        prepared = self._prepared(piece, carried)
        for group, texts in self._groups(list(self._pieces(TEXTS).values())):
            for row, images in prepared:
                scores = self._scores(images, texts, row)
                for one in counts.values():
                    one.add(row, group.start, scores)
                progress(scores.size)
        arrays = {
            f"{name}.{key}": value
            for name, one in counts.items()
            for key, value in one.arrays().items()
        }
        self._write(COUNTS, piece, arrays, carried, started)

    def _own_scores(self) -> OwnScores:
        if self._own is None:
            right = np.empty(self.captions, np.float32)
            for piece in self._pieces(OWN).values():
                right[self._captions_of(piece.start, piece.stop)] = self._read(OWN, piece)["right"]
            self._own = OwnScores.of(right, self.owners, self.images)
        return self._own

    def _captions_of(self, first: int, last: int) -> np.ndarray:
        """Return the captions of the images from `first` to `last` - 1, image after image."""
        return self.order[self.starts[first] : self.starts[last]]

    def _prepared(self, piece: range, carried: Carried) -> list[tuple[int, Rows]]:
        """Return a block's images ready to be scored, batch by batch, with each one's first row."""
        batches = carried.watch("images", self.loaders.images.only(piece))
        found, row = [], piece.start
        for tokens in encoded(self.model.encode_image_batch, batches, self.device, self.autocast):
            with self.autocast():
                found.append((row, self.model.prepare_images(tokens)))
            row += len(tokens)
        return found

    def _groups(self, groups: Sequence[range]) -> Iterator[tuple[range, Any]]:
        """Yield groups of captions ready to be scored; the next one is read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(read_arrays, self._path(TEXTS, groups[0]))] if groups else []
            for place, group in enumerate(groups):
                found = coming.pop().result()
                arrays = self._read(TEXTS, group) if found is None else found[0]
                if place + 1 < len(groups):
                    path = self._path(TEXTS, groups[place + 1])
                    coming.append(reader.submit(read_arrays, path))
                with self.autocast():
                    texts = self.model.bucketed(arrays_tokens(arrays, self.device))
                yield group, texts

    def _scores(self, images: Rows, texts: Any, row: int) -> np.ndarray:
        """Return the similarities of a batch of images with a group of captions, finite."""
        with self.autocast():
            maps = self.model.prepared_maps(images, texts)
        scores = maps["similarity"].float().cpu().numpy()
        bad = scores.size - np.count_nonzero(np.isfinite(scores))
        if bad:
            raise NonFiniteError(
                f"{bad} of {scores.size} similarities of images {row} to {row + len(scores) - 1} "
                "are not finite"
            )
        return scores


def _clocks() -> Clocks:
    """Return the seconds of the wall's clock and of this process's, loader workers left out."""
    return time.perf_counter(), time.process_time()


def stages_told(stages: dict[str, dict[str, float]]) -> str:
    """Return a line on what the kinds of files took."""
    size = sum(one["bytes"] for one in stages.values())
    told = ", ".join(f"{UNITS[kind]} {one['seconds']:,.1f} s" for kind, one in stages.items())
    return f"{told} of all processes together, {size / 1e6:,.1f} MB"
