"""Names of results: the field's only where the counts are the field's."""

from __future__ import annotations

import numpy as np
import pytest

from lib.retrieval import evaluation
from lib.retrieval.evaluation import find_table, split_tables


@pytest.mark.parametrize(
    ("dataset", "split", "images", "names"),
    [
        ("f30k", "test", 1000, ["f30k_1k"]),
        ("f30k", "test", 999, ["f30k_999"]),
        ("coco", "test", 5000, ["coco_1k", "coco_5k"]),
        ("coco", "test", 1000, ["coco_1000"]),
        ("f8k", "test", 1000, ["f8k_1000"]),
        ("scenes", "test", 16, ["scenes"]),
        ("coco", "dev", 5000, ["coco_dev"]),
    ],
)
def test_results_are_named_by_data_set_and_count(monkeypatch, dataset, split, images, names):
    monkeypatch.setattr(evaluation, "split_results", lambda matrix, rows, folds=1: {"folds": folds})
    tables = split_tables(dataset, split, np.arange(images), np.zeros((images, 1), np.float32))
    assert list(tables) == names
    results = {"f30k_dev": 1, "f30k_1k_more": 2, "f8k_x": 3, **tables}
    assert find_table(results, dataset, split) == {"folds": 1}
    assert find_table({"f30k_dev": 1, "coco_1k": 2, "f8k_x": 3}, dataset, split) is None
