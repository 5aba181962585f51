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
    entries = {name: {"folds": folds} for name, folds in tables.items()}
    results = {"f30k_dev": {"folds": 1}, "f30k_1k_more": {}, "f8k_x": {}, **entries}
    assert find_table(results, dataset, split) == {"folds": 1}
    others = {"f30k_dev": {}, "coco_1k": {}, "f8k_x": {}}
    assert find_table(others, dataset, split) is None


def test_of_several_tables_of_a_split_the_newest_is_found():
    old, new = {"date": "2026-11-24T10:00"}, {"date": "2026-11-25T09:00"}
    assert find_table({"f8k_900": old, "f8k_1000": new, "f8k_20_first20": {}}, "f8k", "test") == new
    assert find_table({"f8k_1000": new, "f8k_900": old}, "f8k", "test") == new
