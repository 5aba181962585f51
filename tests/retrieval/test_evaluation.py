"""Names of results: the field's only where the counts are the field's."""

from __future__ import annotations

import pytest

from lib.retrieval.evaluation import find_table, result_names


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
def test_results_are_named_by_data_set_and_count(dataset, split, images, names):
    tables = result_names(dataset, split, images)
    assert list(tables) == names
    assert tables.get("coco_1k", 5) == 5
    results = {"f30k_dev": 1, "f30k_1k_more": 2, "f8k_x": 3, **tables}
    assert find_table(results, dataset, split) == 1
    assert find_table({"f30k_dev": 1, "coco_1k": 2, "f8k_x": 3}, dataset, split) is None
