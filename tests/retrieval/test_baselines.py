"""tools.compare's rows against the best baseline of their protocol, with Holm's correction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.retrieval.baselines import against_baselines, intervals_of, told_lines
from lib.retrieval.bootstrap import holm, paired_differences
from lib.retrieval.comparison import FinishedRun, Row, by_protocol, report_page, summarize
from lib.retrieval.metrics import QueryRanks
from lib.retrieval.result_files import ranks_file, write_ranks
from tests.retrieval.test_compare import finished


def ranked_run(folder: Path, row: Row, seed: int, chance: float, protocol: str = "none"):
    """A finished run in which each query is found with the same chance, its ranks on disk."""
    rng = np.random.default_rng([seed, *row.name.encode()])
    owners = np.repeat(np.arange(200), 5)
    i2t, t2i = (np.where(rng.random(count) < chance, 1, 20) for count in (200, 1000))
    ranks = QueryRanks(i2t, t2i, owners)
    home = folder / row.name / f"seed{seed}"
    home.mkdir(parents=True)
    write_ranks(home / ranks_file("scenes"), ranks)
    entry = {**ranks.metrics(), "protocol": protocol, "val_split": "dev"}
    entry["ranks"] = ranks_file("scenes")
    return FinishedRun(row, seed, {"test": entry}, 1, 1.0, "a CPU", home), ranks


def test_rows_against_the_best_baseline_with_holm(tmp_path):
    chances = {"laps": 0.5, "vse": 0.4, "seps": 0.7, "near": 0.505}
    rows = {name: Row(name, (), baseline=name in ("laps", "vse")) for name in chances}
    made = {
        name: [ranked_run(tmp_path, row, seed, chances[name]) for seed in range(2)]
        for name, row in rows.items()
    }
    oracle = Row("seps_oracle", ())
    runs = [run for group in made.values() for run, _ in group]
    runs.append(ranked_run(tmp_path, oracle, 0, 0.9, "oracle")[0])
    groups = by_protocol(summarize(runs))
    found = {one.row: one for one in against_baselines(groups, runs, "test")}
    assert set(found) == {"vse", "seps", "near"}  # the oracle's protocol has no baseline
    assert {one.baseline for one in found.values()} == {"laps"}
    sides = {name: [ranks for _, ranks in group] for name, group in made.items()}
    plain = {
        name: paired_differences(sides[name], sides["laps"], repeats=2000)["rsum"] for name in found
    }
    corrected = dict(zip(plain, holm([one.p for one in plain.values()]), strict=True))
    for name, one in found.items():
        assert one.rsum == plain[name]
        assert one.p == pytest.approx(corrected[name])
    assert found["seps"].rsum.low > 0
    assert found["seps"].p > plain["seps"].p
    lines = told_lines(list(found.values()))
    assert any(line.startswith("seps - laps (none): rSum +") for line in lines)


def test_seeds_that_ranked_other_images_have_no_interval(tmp_path):
    row, other = Row("laps", ()), Row("vse", ())
    runs = [ranked_run(tmp_path, row, seed, 0.5)[0] for seed in range(2)]
    runs.append(ranked_run(tmp_path, other, 0, 0.5)[0])
    assert intervals_of(runs, "test").keys() == {("none", "laps"), ("none", "vse")}
    fewer = QueryRanks(np.ones(100, int), np.ones(500, int), np.repeat(np.arange(100), 5))
    write_ranks(runs[1].folder / ranks_file("scenes"), fewer)
    assert intervals_of(runs, "test").keys() == {("none", "vse")}


def test_rows_without_ranks_are_not_compared(tmp_path):
    runs = [finished("laps", 0, 300.0), finished("seps", 0, 310.0)]
    assert against_baselines(by_protocol(summarize(runs)), runs, "test") == []


def test_the_page_shows_the_differences():
    group = summarize([finished("seps", 0, 310.0), finished("laps", 0, 300.0)])
    cells = {"none": {"seps": "+10.0 (+1.0 to +19.0), p = 0.040", "laps": "baseline"}}
    page = report_page("title", [], {"none": group}, [], against=cells)
    assert "| rSum − baseline |" in page
    assert "| 310.0 | +10.0 (+1.0 to +19.0), p = 0.040 |" in page
    assert "| 300.0 | baseline |" in page
    assert "best baseline" not in report_page("title", [], {"none": group}, [])
