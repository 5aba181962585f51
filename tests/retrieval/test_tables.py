"""The printed table: columns, width, and oracle rows apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.retrieval.metrics import recall_metrics
from lib.retrieval.tables import format_table
from tests.retrieval.test_metrics import noisy_gallery


def test_table_rows_and_columns():
    recalls = {"r1": 1.04, "r5": 22.25, "r10": 100.0, "medr": 1.0, "meanr": 1.0}
    others = {"r1": 4.0, "r5": 5.0, "r10": 6.0, "medr": 1.0, "meanr": 1.0}
    result = {"i2t": recalls, "t2i": others, "rsum": 138.29, "ties": 0, "protocol": "image"}
    assert format_table({"f30k_1k": result, "scenes": result}).splitlines() == [
        "                         I2T                  T2I",
        "split      R@1    R@5   R@10    R@1    R@5   R@10   rSum",
        "--------------------------------------------------------",
        "f30k_1k    1.0   22.2  100.0    4.0    5.0    6.0  138.3",
        "scenes     1.0   22.2  100.0    4.0    5.0    6.0  138.3",
    ]


@settings(max_examples=25)
@given(st.lists(st.text("abc_1", max_size=100), unique=True, max_size=4))
def test_table_fits_the_terminal(splits):
    best = recall_metrics(np.eye(11), captions_per_image=1)
    lines = format_table(dict.fromkeys(splits, best)).splitlines()
    assert len(lines) == 3 + len(splits)
    assert max(map(len, lines)) <= 80
    assert all(line.endswith("  100.0  100.0  600.0") for line in lines[3:])


def test_table_cuts_a_long_name():
    best = recall_metrics(np.eye(11), captions_per_image=1)
    lines = format_table({"a" * 31: best, "b" * 32: best}).splitlines()
    assert lines[3].startswith("a" * 31 + "  100.0")
    assert lines[4].startswith("b" * 30 + "…  100.0")
    assert [len(line) for line in lines[3:]] == [80, 80]


def test_oracle_rows_stand_below_a_line_that_says_why():
    rows = {
        "told": {**recall_metrics(np.eye(11), 1), "protocol": "oracle"},
        "honest": {**recall_metrics(np.eye(11), 1), "protocol": "image"},
    }
    lines = format_table(rows).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["honest", "oracle:", "told"]
    assert "made from their own answers" in lines[4]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("depths", [(1, 5, 10, 50), (1, 2, 3, 5, 10, 50), range(1, 20)])
def test_a_table_of_many_recalls_fits_the_terminal(depths):
    result = recall_metrics(noisy_gallery(60), recall_at=tuple(depths))
    text = format_table({"coco_5k": result, "a_rather_long_name": result}, tuple(depths))
    assert max(map(len, text.splitlines())) <= 80
    for k in depths:
        assert f"R@{k} " in text.replace("\n", " ")
