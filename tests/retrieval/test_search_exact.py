"""Scores from an index are the method's, at the sizes people use, whatever is asked at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.batch import Batch, Tokens, length_mask
from lib.model import compiled, native
from lib.retrieval.index import Part, Picture, PictureIndex
from lib.retrieval.records import RecordFile
from lib.retrieval.search import Searcher, encode_records, vector_dimension
from lib.retrieval.shortlist import saved_shortlist
from tests.helpers import tiny_model

pytest.importorskip("faiss")
SIDE, PATCHES, WIDTH, PICTURES = 112, 196, 512, 21
CPU = torch.device("cpu")
ERROR = {"float16": 1e-3, "int8": 2e-2}


def real_model(method: str):
    flags = {"dense_side": "none"} if method == "seps" else {}
    sizes = {"img_res": SIDE, "embed_size": WIDTH, "tiny_patch_size": 8}
    return tiny_model(method, **sizes, **flags).eval()


def random_tokens(count: int, width: int, seed: int, cls: bool = False) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, width + 1, (count,), generator=generator)
    mask = torch.ones(count, width).bool() if cls else length_mask(lengths, width)
    return Tokens(
        torch.randn(count, width, WIDTH, generator=generator),
        mask,
        torch.randn(count, 1, WIDTH, generator=generator) if cls else None,
    )


def searcher(folder, model, images: Tokens, store: str) -> Searcher:
    """The images in an index of two shards, ready for queries."""
    blank = Batch(pixels=torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    manifest = {"folder": "/", "store": store, "dimension": vector_dimension(model, blank, CPU)}
    index = PictureIndex.create(folder, manifest)
    for rows in (range(8), range(8, len(images))):
        vectors, records = encode_records(model, images[list(rows)], store)
        index.add_shard(Part(), [Picture(f"{row}.jpg") for row in rows], vectors, records)
    index.refresh()
    return Searcher(model, index, saved_shortlist(index), blank, CPU)


@pytest.mark.parametrize("store", ["float16", "int8"])
@pytest.mark.parametrize("method", ["laps", "seps"])
@pytest.mark.parametrize("captions", [1, 3, 40])
def test_scores_are_the_method_s_own(method, store, captions, tmp_path):
    model, texts = real_model(method), random_tokens(captions, 30, seed=captions)
    images = random_tokens(PICTURES, PATCHES, seed=0, cls=True)
    found = searcher(tmp_path / "index", model, images, store)
    order = np.random.default_rng(0).permutation(PICTURES)
    with torch.inference_mode():
        wanted = model.similarity(images, texts).numpy()[order]
    scores = found.similarity(order, texts)
    assert scores.shape == (PICTURES, captions)
    apart = np.abs(scores - wanted)
    # where two patches tie but for the store's rounding, another one is kept
    assert np.quantile(apart, 0.9) < ERROR[store]
    assert apart.max() < 0.05
    alone = np.concatenate([found.similarity(order, texts[[n]]) for n in range(captions)], 1)
    np.testing.assert_allclose(alone, scores, rtol=0, atol=2e-6)


@pytest.mark.skipif(not compiled.is_available(), reason="no C compiler")
def test_no_gram_matrix_is_made_for_one_caption(tmp_path, monkeypatch):
    model, images = real_model("laps"), random_tokens(PICTURES, PATCHES, seed=0, cls=True)
    found, seen = searcher(tmp_path / "index", model, images, "float16"), []
    run = native._run
    monkeypatch.setattr(
        native, "_run", lambda sizes, tensors: (seen.append(tensors), run(sizes, tensors))
    )
    found.similarity(np.arange(PICTURES), random_tokens(1, 12, seed=1))
    assert seen
    assert all(one["gram"] is None and one["direct"].all() for one in seen)
    seen.clear()
    many = random_tokens(64, 12, seed=1)
    many.mask[:] = True  # of one length: scored at once
    found.similarity(np.arange(PICTURES), many)
    assert all(one["gram"] is not None for one in seen)


def test_pictures_are_read_in_the_order_they_lie(tmp_path, monkeypatch):
    model, images = real_model("laps"), random_tokens(PICTURES, PATCHES, seed=0, cls=True)
    found, read = searcher(tmp_path / "index", model, images, "float16"), []
    take = RecordFile.take

    def watched(self, rows):
        read.extend((self.path.parent.name, int(row)) for row in rows)
        return take(self, rows)

    monkeypatch.setattr(RecordFile, "take", watched)
    order = np.random.default_rng(1).permutation(PICTURES)
    found.similarity(order, random_tokens(1, 12, seed=1))
    assert read == sorted(read)
    assert len(read) == PICTURES


def test_nothing_asked_nothing_scored(tmp_path):
    model, images = real_model("laps"), random_tokens(PICTURES, PATCHES, seed=0, cls=True)
    found = searcher(tmp_path / "index", model, images, "float16")
    assert found.similarity(np.empty(0, int), random_tokens(2, 12, seed=1)).shape == (0, 2)
