"""The shortlist: kinds of faiss, and a query map that learns what the similarity orders by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.batch import Tokens
from lib.retrieval.shortlist import build_shortlist, choose_kind
from lib.retrieval.vectors import QueryMap, fit_query_map, image_vectors, text_features

faiss = pytest.importorskip("faiss")


def test_the_kind_goes_by_the_number_of_pictures():
    assert [choose_kind("auto", n) for n in (50_000, 50_001, 2_000_000)] == [
        "flat",
        "hnsw",
        "ivfpq",
    ]
    assert choose_kind("flat", 10**7) == "flat"


@pytest.mark.parametrize(("kind", "share"), [("flat", 1.0), ("hnsw", 0.95), ("ivfpq", 0.6)])
def test_the_nearest_vectors_are_found(kind, share):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2000, 16)).astype(np.float32)
    queries = vectors[:20] + 0.1 * rng.standard_normal((20, 16)).astype(np.float32)
    found = build_shortlist(vectors, kind).search(queries, 30)
    exact = np.argsort(-queries @ vectors.T, axis=1)[:, :30]
    kept = np.mean([len(set(a) & set(b)) / 30 for a, b in zip(found, exact, strict=True)])
    assert kept >= share


def test_fewer_pictures_than_the_shortlist_and_none_at_all():
    few = build_shortlist(np.eye(3, dtype=np.float32))
    assert few.search(np.ones((1, 3)), 256).shape == (1, 3)
    assert build_shortlist(np.empty((0, 3), np.float32)).search(np.ones((1, 3)), 5).shape == (1, 0)


def test_a_fitted_map_orders_images_as_a_hidden_product_does():
    rng = np.random.default_rng(1)
    vectors, features = rng.standard_normal((400, 12)), 3 + rng.standard_normal((300, 9))
    hidden = rng.standard_normal((9, 12))
    scores = features @ hidden @ vectors.T + 50 * rng.standard_normal((300, 1))  # an offset a row
    fitted = fit_query_map(vectors[:256], features[:192], scores.T[:256, :192])
    queries = features[192:] @ fitted.matrix[:-1] + fitted.matrix[-1]
    guessed, exact = queries @ vectors[256:].T, scores[192:, 256:]
    kept = [
        len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10
        for a, b in zip(guessed, exact, strict=True)
    ]
    assert np.mean(kept) > 0.9


def test_padding_words_change_no_vector():
    local = torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tokens, short = Tokens(local, mask), Tokens(local[1:, :3], mask[1:, :3])
    assert torch.allclose(text_features(tokens)[1:], text_features(short), atol=1e-6)
    assert torch.allclose(image_vectors(tokens)[1:], image_vectors(short), atol=1e-6)


def test_a_pooled_embedding_is_its_own_query():
    one = Tokens(torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 1, dtype=torch.bool))
    assert np.allclose(QueryMap()(one, one) @ image_vectors(one).numpy().T, 1)
