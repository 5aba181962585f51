"""The report: numbers of results.json, groups by hand, one file that holds all; in Chromium too."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from lib.retrieval.metrics import QueryRanks, query_ranks
from lib.retrieval.report import RunReport, length_rows, recall_table
from lib.retrieval.result_files import StoredResult, ranks_file, write_ranks
from tests.tools.browser import DESKTOP, PHONE, browser, overflow, requested, require_browser
from tools.report import main

pytest.importorskip("matplotlib")


def facts(rsum: float = 300.0, **changed) -> dict:
    ways = {way: {"r1": 10.0, "r5": 50.0, "r10": 90.0} for way in ("i2t", "t2i")}
    return {**ways, "rsum": rsum, "protocol": "none", "images": 16, "captions": 80, **changed}


def write_run(folder, checkpoint, seed: int):
    """A run folder as training and evaluation leave it, with made-up similarities."""
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir()
    shutil.copy(checkpoint, folder / "model_best.pth")
    arguments = {"method": "seps", "seed": seed, "note": "<script>alert(1)</script>"}
    (folder / "args.json").write_text(json.dumps(arguments))
    rows = np.arange(16).repeat(5)
    matrix = np.random.default_rng(seed).standard_normal((16, 80))
    matrix[rows, np.arange(80)] += seed
    ranks = query_ranks(matrix, caption_images=rows)
    name = ranks_file("scenes")
    write_ranks(folder / name, ranks)
    entry = {**facts(), **ranks.metrics(), "ranks": name, "method": "seps", "split": "test"}
    entry["intervals"] = {"rsum": [entry["rsum"] - 5, entry["rsum"] + 5]}
    (folder / "results.json").write_text(json.dumps({"scenes": entry}))
    with SummaryWriter(str(folder)) as events:
        for step in range(5):
            events.add_scalar("train/loss", 5 - step, step)
            events.add_scalar("val/rsum", 100 + step, step)
    return entry


@pytest.fixture(scope="module")
def report(seps_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    entries = [write_run(root / f"run{seed}", seps_checkpoint, seed) for seed in (1, 3)]
    out = root / "report.html"
    assert main([str(root / "run1"), str(root / "run3"), "--out", str(out), "--examples", "1"]) == 0
    return out, entries


def test_the_report_holds_the_results_and_everything_it_shows(report):
    out, entries = report
    text = out.read_text(encoding="utf-8")
    for entry in entries:
        assert f"<td>{entry['rsum']:.1f}</td>" in text
        assert f"<td>{entry['t2i']['r5']:.1f}</td>" in text
    difference = entries[1]["rsum"] - entries[0]["rsum"]
    assert f"<td>{difference:+.1f}</td>" in text
    assert "run3 − run1" in text
    assert text.count("<svg") == 2  # loss, rSum
    assert text.count("data:image/jpeg;base64,") >= 2 * 2 * 6
    assert "kept, sparse text" in text
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text)
    assert links == []


def test_groups_of_caption_lengths_are_counted_by_hand():
    ranks = QueryRanks(np.ones(2), np.array([1, 11, 2, 1]), np.array([0, 0, 1, 1]))
    captions = ["a b", "a b c", "a b c d e f g", " ".join("a" * 25)]
    assert length_rows(ranks, captions) == [
        ["1 to 6", "2", "50.0", "50.0"],
        ["7 to 9", "1", "0.0", "100.0"],
        ["more than 20", "1", "100.0", "100.0"],
    ]


def test_oracle_rows_stand_apart_below_a_line(tmp_path):
    ranks = QueryRanks(np.ones(1), np.ones(1), np.zeros(1, int))
    results = {
        "told": StoredResult(tmp_path, "told", facts(599.0, protocol="oracle"), ranks),
        "honest": StoredResult(tmp_path, "honest", facts(), ranks),
    }
    table = recall_table([RunReport(tmp_path, "run", {}, results, {})])
    assert table.index("honest") < table.index("not comparable") < table.index("told")


def test_bad_input_is_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "eval.py" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_in_chromium(report, size):
    require_browser()
    with browser(size) as driver:
        driver.get(report[0].as_uri())
        broken = "return [...document.images].filter(i => !i.naturalWidth).length"
        assert driver.execute_script(broken) == 0
        assert overflow(driver) <= 0
        asked = [one for one in requested(driver) if not one.startswith("data:")]
        assert asked == [report[0].as_uri()]
        complaints = [one for one in driver.get_log("browser") if one["level"] == "SEVERE"]
        assert complaints == []
        # what is printed holds the pages whole
        printed = driver.execute_cdp_cmd("Page.printToPDF", {})["data"]
        assert len(printed) > 10_000
