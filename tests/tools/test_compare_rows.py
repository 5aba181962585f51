"""Rows of a comparison: stages that start from another row, and what their line tells."""

from __future__ import annotations

from lib.retrieval.comparison import FinishedRun, Row, markdown_table, summarize
from tests.retrieval.test_compare import table
from tools.compare import __main__ as compare
from tools.compare.rows import pick_rows, rows_of


def test_a_stage_starts_from_the_checkpoint_of_its_row_and_seed(tmp_path):
    args = compare.parser().parse_args(["--rows", "d2s"])
    rows = pick_rows(rows_of(args), args.rows)
    assert [row.name for row in rows] == ["d2s_pretrain", "d2s"]  # what it starts from comes first
    runs = [compare.plan_run(row, 3, ["--dataset", "scenes"], tmp_path) for row in rows]
    assert runs[1].settings["weight_path"] == str(runs[0].folder / "model_best.pth")
    assert runs[0].settings["pretrain"]


def test_rows_trained_with_dense_texts_are_marked_where_evaluation_reads_none():
    runs = []
    for name, protocol, dense in (("a", "none", True), ("b", "none", False), ("c", "image", True)):
        tables = {"test": {**table(100.0, protocol), "trained_on_dense": dense}}
        runs.append(FinishedRun(Row(name, ()), 0, tables, 1, 1.0, "here"))
    page = markdown_table(summarize(runs))
    assert "| a † |" in page
    assert "| b |" in page
    assert "| c |" in page
    assert page.endswith("† trained with dense texts; no query or gallery item carries one\n")
    assert "†" not in markdown_table(summarize(runs[1:]))
