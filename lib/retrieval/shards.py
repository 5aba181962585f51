"""Rows of a similarity matrix on disk while it is computed, so that a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lib.distributed import rank, world_size
from lib.retrieval.result_files import save_matrix


class RowStore:
    """This rank's finished rows, in order, as files below `folder`, which all ranks share.

    `made_from` is what the rows depend on (plain values): rows of anything else lie in another
    folder, named by its digest behind `name`, that of the result. Where nothing can be written the
    evaluation goes on without, and says so once.
    """

    def __init__(
        self, folder: str | Path, made_from: Mapping[str, Any], columns: int, name: str = "split"
    ) -> None:
        self.root, self.name = Path(folder), name.replace("/", "_")
        told = json.dumps({**made_from, "processes": world_size()}, sort_keys=True, default=str)
        self.folder = self.root / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        self.columns = columns
        self.broken = False

    def finished(self) -> list[np.ndarray]:
        """Return the row blocks of an earlier, killed evaluation, (rows, columns) each, in order.

        The last of them is left out: with at least one batch to read, the protocol is told by what
        that batch carries.
        """
        blocks: list[np.ndarray] = []
        rows = 0
        while (block := self._read(rows)) is not None:
            blocks.append(block)
            rows += len(block)
        return blocks[:-1]

    def add(self, start: int, block: np.ndarray) -> None:
        """Keep the rows from `start` (counted from this rank's first) on."""
        if self.broken:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_matrix(self._path(start), block)
        except OSError as error:
            self.broken = True
            print(
                f"{self.folder}: finished rows can't be kept ({error.strerror or error}); the "
                "evaluation goes on, and would start anew if it were stopped",
                file=sys.stderr,
            )

    def discard(self) -> None:
        """Remove the rows of this and of earlier evaluations of the same name, at the end.

        One process calls it. Rows of other results, as of another split, stay.
        """
        for one in self.root.iterdir() if self.root.is_dir() else ():
            if one.name.rpartition("-")[0] in ("", self.name):  # "": of before rows had names
                shutil.rmtree(one, ignore_errors=True)
        with suppress(OSError):  # not empty, or not there
            self.root.rmdir()

    def _path(self, start: int) -> Path:
        return self.folder / f"rank{rank()}_{start:07d}.npy"

    def _read(self, start: int) -> np.ndarray | None:
        try:
            block = np.load(self._path(start), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        fits = block.ndim == 2 and block.shape[1] == self.columns and len(block)
        return block if fits else None
