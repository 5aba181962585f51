"""A shortlist of pictures by one global vector each, kept and searched by faiss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.files import read_json, temporary_beside, write_json
from lib.retrieval.index import PictureIndex

KINDS = ("auto", "flat", "hnsw", "ivfpq")
FLAT_UP_TO = 50_000
HNSW_UP_TO = 1_000_000
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 80, 512
IVF_PROBES = 64
TRAINED_ON = 200_000  # vectors that IVF-PQ learns its cells and codes from


def require_faiss() -> Any:
    """Return the module. Raises InputError where it is not installed."""
    try:
        import faiss  # an optional part: searching alone needs it
    except ImportError as error:
        raise InputError(
            f"no search without faiss ({error}): python -m pip install faiss-cpu"
        ) from None
    return faiss


def choose_kind(kind: str, count: int) -> str:
    """Return flat, hnsw or ivfpq; `auto` goes by the number of vectors."""
    if kind != "auto":
        return kind
    return "flat" if count <= FLAT_UP_TO else "hnsw" if count <= HNSW_UP_TO else "ivfpq"


class Shortlist:
    """The nearest vectors of an index by inner product, through faiss."""

    def __init__(self, faiss_index: Any, kind: str) -> None:
        self.index = faiss_index
        self.kind = kind

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the numbers of the `count` nearest pictures of each query, (Q, count), best first.

        Fewer where faiss finds fewer: such rows end in -1.
        """
        count = min(count, self.index.ntotal)
        if count == 0:
            return np.empty((len(queries), 0), dtype=np.int64)
        return self.index.search(np.ascontiguousarray(queries, dtype=np.float32), count)[1]


def build_shortlist(vectors: np.ndarray, kind: str = "auto") -> Shortlist:
    """Return the shortlist of vectors (N, D). Raises InputError where faiss is missing."""
    faiss = require_faiss()
    kind = choose_kind(kind, len(vectors))
    dimension = vectors.shape[1]
    if kind == "flat":
        index = faiss.IndexFlatIP(dimension)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    else:
        index = _ivfpq(faiss, vectors)
    index.add(np.ascontiguousarray(vectors))
    return Shortlist(index, kind)


def _ivfpq(faiss: Any, vectors: np.ndarray) -> Any:
    count, dimension = vectors.shape
    if count < 256:
        raise InputError(f"--faiss ivfpq learns from at least 256 pictures, not {count}: take flat")
    cells = int(max(1, min(4 * np.sqrt(count), count // 39)))
    codes = next(m for m in (64, 48, 32, 24, 16, 8, 4, 2, 1) if dimension % m == 0)
    quantiser = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFPQ(quantiser, dimension, cells, codes, 8, faiss.METRIC_INNER_PRODUCT)
    index.own_fields = True
    quantiser.this.disown()  # the index frees it
    index.nprobe = min(IVF_PROBES, cells)
    chosen = np.random.default_rng(0).permutation(count)[:TRAINED_ON]
    index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
    return index


def saved_shortlist(index: PictureIndex, kind: str = "auto") -> Shortlist:
    """Return the index's shortlist: as saved in its folder, else built now and saved.

    Where the folder can't be written to, it is only built.
    """
    faiss = require_faiss()
    kind = choose_kind(kind, len(index))
    folder = index.folder / "faiss"
    facts = {"state": index.state, "kind": kind, "count": len(index)}
    if read_json(folder / "built.json") == facts:
        try:
            return Shortlist(faiss.read_index(str(folder / "vectors.faiss")), kind)
        except RuntimeError:
            pass  # damaged: built anew below
    shortlist = build_shortlist(index.vectors, kind)
    _save(faiss, shortlist, folder, facts)
    return shortlist


def _save(faiss: Any, shortlist: Shortlist, folder: Path, facts: dict[str, Any]) -> None:
    try:
        folder.mkdir(exist_ok=True)
        (folder / "built.json").unlink(missing_ok=True)
        temporary = temporary_beside(folder / "vectors.faiss")
        faiss.write_index(shortlist.index, str(temporary))
        os.replace(temporary, folder / "vectors.faiss")
        write_json(folder / "built.json", facts)
    except (OSError, RuntimeError):
        return
