"""Search an index: a shortlist by global vectors, then the method's exact similarity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.batch import Batch, Rows, Tokens
from lib.methods.base import Method
from lib.retrieval.index import Part, Picture, PictureIndex, Plan, fingerprint
from lib.retrieval.records import flatten, joined, pack, unflatten, unpack
from lib.retrieval.result_files import save_matrix
from lib.retrieval.shortlist import Shortlist
from lib.retrieval.vectors import QueryMap, fit_query_map, image_vectors, text_features

SHORTLIST = 256
SHARD_PICTURES = 512
RERANKED_AT_ONCE = 8  # pictures read and scored at once: what they hold stays in the caches
FITTED_ON = 1024  # pictures
QUERY_MAP = "query_map.npy"


@dataclass(frozen=True)
class Hit:
    """A picture that was found; score is the method's similarity, or a cosine between pictures."""

    picture: int
    path: str
    score: float


@dataclass(frozen=True)
class Kept:
    """Of the exact top `top` among the shortlist and `others` more pictures, so many were in it."""

    top: int
    kept: int
    others: int
    left: int  # pictures outside the shortlist, of which the others are a sample


def matches_dense(model: Method) -> bool:
    """Return whether the method matches dense texts with captions, beside the patches."""
    return getattr(model, "dense_match", None) is not None


@torch.inference_mode()
def encode_records(model: Method, images: Tokens, store: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the global vectors (B, D) and the records of images that an index keeps."""
    vectors = image_vectors(images, matches_dense(model)).cpu().numpy()
    fields = flatten(stored_part(model.prepare_images(images)).tensors())
    return vectors, pack(fields, store, images.local.shape[-1])


@torch.inference_mode()
def vector_dimension(model: Method, blank: Batch, device: torch.device) -> int:
    """Return the length D of the global vectors that the model gives images."""
    images = model.encode_image_batch(blank.to(device))
    return image_vectors(images, matches_dense(model)).shape[1]


def stored_part(rows: Rows) -> Rows:
    """Return prepared images without what follows from their other fields: Gram matrix, peaks."""
    changed: dict[str, Any] = {}
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, Rows):
            changed[field.name] = stored_part(value)
        elif field.name in rows.recomputed:
            changed[field.name] = None
    return replace(rows, **changed)


@torch.inference_mode()
def fill_index(
    model: Method,
    index: PictureIndex,
    plan: Plan,
    part: Part,
    batches: Iterable[tuple[Batch | None, list[int]]],
    device: torch.device,
    progress: Callable[[int], None] = lambda count: None,
    dense: Sequence[str] | None = None,
) -> int:
    """Add the pictures of the plan to the index, shard by shard; return how many were read.

    `batches` yields (images, their places in `plan.to_read`); a bad picture is in none of them.
    `dense` are the texts of those in `plan.to_read`, kept to show later what was seen.
    What stops this, Ctrl-C too, leaves whole shards, and the one begun is finished first.
    """
    shard = _Shard(index, part)
    count = 0
    try:
        for batch, places in batches:
            if batch is not None:
                images = model.encode_image_batch(batch.to(device))
                texts = None if dense is None else [dense[one] for one in places]
                shard.add([plan.to_read[one] for one in places], model, images, texts)
                count += len(places)
            progress(len(places))
            if len(shard) >= SHARD_PICTURES:
                shard.write([])
    finally:
        shard.write([])
    shard.write([path for path in plan.gone])
    index.refresh()
    return count


class _Shard:
    """Pictures read so far that are not on disk yet."""

    def __init__(self, index: PictureIndex, part: Part) -> None:
        self.index, self.part = index, part
        self._clear()

    def _clear(self) -> None:
        self.pictures: list[Picture] = []
        self.vectors: list[np.ndarray] = []
        self.records: list[np.ndarray] = []
        self.dense: list[str] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def add(
        self, paths: Sequence[str], model: Method, images: Tokens, dense: list[str] | None
    ) -> None:
        vectors, records = encode_records(model, images, self.index.manifest["store"])
        for path in paths:
            file = self.index.picture_folder / path
            stat = file.stat()
            self.pictures.append(Picture(path, stat.st_size, stat.st_mtime_ns, fingerprint(file)))
        self.vectors.append(vectors)
        self.records.append(records)
        self.dense += dense or []

    def write(self, gone: Sequence[str]) -> None:
        if not self.pictures and not gone:
            return
        entries = [*self.pictures, *(Picture(path, gone=True) for path in gone)]
        if self.pictures:
            vectors, records = np.concatenate(self.vectors), joined(self.records)
        else:
            vectors, records = np.empty((0, 0)), np.empty(0)
        self.index.add_shard(self.part, entries, vectors, records, self.dense or None)
        self._clear()


class Searcher:
    """A model and an index ready for queries; one thread at a time.

    `blank` is the batch of one image, whatever it shows: how the method lays out what it keeps of
    an image is read off it.
    """

    def __init__(
        self,
        model: Method,
        index: PictureIndex,
        shortlist: Shortlist,
        blank: Batch,
        device: torch.device,
    ) -> None:
        self.model = model
        self.index = index
        self.shortlist = shortlist
        self.device = device
        self.query_map = load_query_map(index)
        with torch.inference_mode():
            self._blank = model.encode_image_batch(blank.to(device))
            self._layout = stored_part(model.prepare_images(self._blank))
        if not matches_dense(model):
            self._blank.dense = None  # it is in no vector

    @torch.inference_mode()
    def encode_text(self, batch: Batch) -> tuple[Tokens, np.ndarray]:
        """Return the tokens of one caption and its query of the shortlist, (1, D)."""
        texts = self.model.encode_text_batch(batch.to(self.device))
        return texts, self.query_map(texts, self._blank)

    def find(self, batch: Batch, top: int = 10, shortlist: int = SHORTLIST) -> list[Hit]:
        """Return the best pictures for a caption: the shortlist's, by exact similarity."""
        texts, vector = self.encode_text(batch)
        candidates = self.nearest(vector, shortlist)
        return self._hits(candidates, self.exact(candidates, texts))[:top]

    @torch.inference_mode()
    def exact(self, pictures: np.ndarray, texts: Tokens) -> np.ndarray:
        """Return the similarity of pictures with one caption, (P,), from the stored records."""
        return self.similarity(pictures, texts)[:, 0]

    @torch.inference_mode()
    def similarity(self, pictures: np.ndarray, texts: Tokens) -> np.ndarray:
        """Return the similarity of pictures with captions, (P, T), from the stored records."""
        captions = self.model.bucketed(texts)
        scores = np.empty((len(pictures), len(texts)), dtype=np.float32)
        order = self.index.reading_order(pictures)
        self.index.prefetch(pictures[order])
        for first in range(0, len(pictures), RERANKED_AT_ONCE):
            rows = order[first : first + RERANKED_AT_ONCE]
            images = self.images(pictures[rows])
            scores[rows] = self.model.prepared_maps(images, captions)["similarity"].float().cpu()
        return scores

    def fit(self, captions: Batch) -> None:
        """Learn which pictures to shortlist from exact similarities of captions; kept on disk."""
        rng = np.random.default_rng(0)
        sample = np.sort(rng.permutation(len(self.index))[:FITTED_ON])
        with torch.inference_mode():
            texts = self.model.encode_text_batch(captions.to(self.device))
        features = text_features(texts).cpu().numpy().astype(np.float64)
        scores = self.similarity(sample, texts).astype(np.float64)
        vectors = self.index.vectors[sample].astype(np.float64)
        self.query_map = fit_query_map(vectors, features, scores)
        save_query_map(self.index, self.query_map)

    def images(self, pictures: np.ndarray) -> Rows:
        """Return what the method needs of pictures, on the device."""
        flat = unpack(self.index.records(pictures))
        tensors: dict[str, Tensor] = {name: one.to(self.device) for name, one in flat.items()}
        return self._layout.refilled(unflatten(tensors))

    @torch.inference_mode()
    def similar(self, image: Batch, top: int = 10) -> list[Hit]:
        """Return the pictures whose global vectors lie nearest to an image's, by cosine."""
        tokens = self.model.encode_image_batch(image.to(self.device))
        vector = image_vectors(tokens, matches_dense(self.model)).cpu().numpy()
        candidates = self.nearest(vector, top)
        vectors = self.index.vectors[candidates]
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector)
        return self._hits(candidates, vectors @ vector[0] / norms)

    @torch.inference_mode()
    def captions_for(
        self, image: Batch, captions: Iterable[Batch], top: int = 10
    ) -> list[tuple[int, float]]:
        """Return (place, similarity) of the captions that fit an image best, exactly scored."""
        prepared = self.model.prepare_images(self.model.encode_image_batch(image.to(self.device)))
        scores = []
        for batch in captions:
            texts = self.model.bucketed(self.model.encode_text_batch(batch.to(self.device)))
            scores.append(self.model.prepared_maps(prepared, texts)["similarity"][0].cpu().numpy())
        whole = np.concatenate(scores)
        order = np.argsort(-whole, kind="stable")[:top]
        return [(int(one), float(whole[one])) for one in order]

    def kept(self, batch: Batch, top: int = 10, others: int = 1000, seed: int = 0) -> Kept:
        """Return how many of the exact `top` the shortlist held, on a sample of the others."""
        texts, vector = self.encode_text(batch)
        candidates = self.nearest(vector, SHORTLIST)
        left = np.setdiff1d(np.arange(len(self.index)), candidates)
        sample = np.random.default_rng(seed).permutation(left)[:others]
        inside, outside = self.exact(candidates, texts), self.exact(sample, texts)
        top = min(top, len(inside) + len(outside))
        best = np.argsort(-np.concatenate([inside, outside]), kind="stable")[:top]
        return Kept(top, int((best < len(inside)).sum()), len(sample), len(left))

    def nearest(self, vector: np.ndarray, count: int) -> np.ndarray:
        """Return the numbers of the pictures that a query (1, D) of the shortlist finds."""
        found = self.shortlist.search(vector, count)[0]
        return found[found >= 0]

    def _hits(self, pictures: np.ndarray, scores: np.ndarray) -> list[Hit]:
        order = np.argsort(-scores, kind="stable")
        paths = self.index.pictures
        return [
            Hit(int(one), paths[one].path, float(score))
            for one, score in zip(pictures[order], scores[order], strict=True)
        ]


def load_query_map(index: PictureIndex) -> QueryMap:
    """Return the index's query map, as fitted; the guess where none was."""
    try:
        matrix = np.load(index.folder / QUERY_MAP)
    except (OSError, ValueError):
        return QueryMap()
    fits = matrix.ndim == 2 and matrix.shape[1] == index.manifest["dimension"]
    return QueryMap(matrix if fits else None)


def save_query_map(index: PictureIndex, query_map: QueryMap) -> None:
    """Write a fitted query map into the index, whole or not at all."""
    save_matrix(index.folder / QUERY_MAP, query_map.matrix)
