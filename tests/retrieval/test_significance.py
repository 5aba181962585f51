"""Result files with their ranks, and two of them compared by tools.significance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.retrieval.metrics import QueryRanks, query_ranks
from lib.retrieval.result_files import (
    ranks_file,
    read_ranks,
    stored_results,
    write_ranks,
    write_results,
)
from lib.retrieval.significance import compare_results
from tools import significance

OWNERS = np.repeat(np.arange(100), 5)


def make_ranks(chance, seed, owners=OWNERS):
    rng = np.random.default_rng(seed)
    images = int(owners.max()) + 1
    return QueryRanks(
        np.where(rng.random(images) < chance, 1, 7),
        np.where(rng.random(len(owners)) < chance, 1, 30),
        owners,
    )


def write_run(folder, ranks, name="f30k_1k", **facts):
    folder.mkdir(parents=True, exist_ok=True)
    entry = {**ranks.metrics(), "method": "laps", "protocol": "none", "ranks": ranks_file(name)}
    write_ranks(folder / ranks_file(name), ranks)
    write_results(folder / "results.json", {name: {**entry, **facts}})
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    """A: three seeds at 70 %; B: one run at 40 %."""
    for seed in range(3):
        write_run(tmp_path / "a" / f"seed{seed}", make_ranks(0.7, seed), method="seps")
    return str(tmp_path / "a"), write_run(tmp_path / "b", make_ranks(0.4, 9))


def test_ranks_survive_the_file(tmp_path):
    ranks = make_ranks(0.5, 0)
    write_ranks(tmp_path / "ranks.npz", ranks)
    found = read_ranks(tmp_path / "ranks.npz")
    assert found.metrics() == ranks.metrics()
    np.testing.assert_array_equal(found.caption_images, ranks.caption_images)


def test_the_tool_prints_differences_and_a_sentence(pair, capsys):
    assert significance.main([*pair, "--repeats", "500"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "f30k_1k: 100 images, 500 captions, protocol none" in text
    assert "(seps, 3 seeds)" in text
    assert "A is better than B by" in text
    assert "Drawn over images and seeds; B is of one seed" in text
    rsum = next(line for line in text.splitlines() if line.startswith("rSum"))
    a, b, difference = (float(word) for word in rsum.split()[1:4])
    assert difference == pytest.approx(a - b, abs=0.02)


def test_the_same_result_twice_differs_in_nothing(pair, capsys):
    assert significance.main([pair[1], pair[1], "--repeats", "200"]) == 0
    assert "No difference in rSum is shown" in capsys.readouterr().out


def test_sides_turned_turn_the_sentence(pair, capsys):
    assert significance.main([*pair[::-1], "--repeats", "200"]) == 0
    assert "B is better than A by" in capsys.readouterr().out


def test_controls_are_compared_where_asked(tmp_path, capsys):
    sides = [str(tmp_path / name) for name in "ab"]
    for side, chance in zip(sides, (0.7, 0.4), strict=True):
        folder = Path(side)
        write_run(folder, make_ranks(chance, 1))
        inverted = make_ranks(0.5 - chance / 2, 1)
        write_run(folder, inverted, "f30k_1k_inverted", selection_control="inverted")
    assert significance.main([*sides, "--repeats", "200"]) == 0
    text = capsys.readouterr().out
    assert "f30k_1k: 100 images" in text
    assert "inverted" not in text
    words = ["--repeats", "200", "--table", "f30k_1k_inverted"]
    assert significance.main([*sides, *words]) == 0
    assert "B is better than A by" in capsys.readouterr().out
    words = ["--repeats", "200", "--table", "f30k_1k", "--table_b", "f30k_1k_inverted"]
    assert significance.main([sides[0], sides[0], *words]) == 0  # the model's own with its control
    text = capsys.readouterr().out
    assert "f30k_1k and f30k_1k_inverted: 100 images" in text
    assert "A is better than B by" in text
    for side in sides:
        entries = json.loads((Path(side) / "results.json").read_text())
        del entries["f30k_1k"]
        (Path(side) / "results.json").write_text(json.dumps(entries))
    assert significance.main(sides) == 2
    assert "share no entry but those of controls (--table NAME)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        ({"protocol": "oracle"}, [], "oracle queries carried text made from their own answers"),
        ({"name": "coco_5k"}, [], "share no entry: f30k_1k and coco_5k"),
        ({}, ["--table", "scenes"], "--table scenes: the two results share no entry"),
        ({"name": "x"}, ["--table", "f30k_1k", "--table_b", "y"], "--table_b y: the entries there"),
        ({}, ["--table_b", "x"], "--table_b x: name A's entry too, with --table"),
        ({"data": {"captions_sha256": "2"}}, [], "not measured on the same data"),
        ({"owners": np.repeat(np.arange(50), 10)}, [], "same images and captions"),
        ({}, ["--repeats", "5"], "at least 100 draws"),
        ({}, ["--level", "100"], "--level 100.0: give a number in (0, 100)"),
    ],
)
def test_what_can_not_be_compared_is_one_sentence(tmp_path, capsys, facts, options, message):
    facts = dict(facts)
    owners, name = facts.pop("owners", OWNERS), facts.pop("name", "f30k_1k")
    a = write_run(tmp_path / "a", make_ranks(0.5, 0), data={"captions_sha256": "1"})
    b = write_run(tmp_path / "b", make_ranks(0.5, 1, owners), name, **facts)
    assert significance.main([a, b, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_image_and_none_are_compared_with_a_word(tmp_path, capsys):
    a = write_run(tmp_path / "a", make_ranks(0.5, 0), protocol="image")
    b = write_run(tmp_path / "b", make_ranks(0.5, 1))
    assert significance.main([a, b, "--repeats", "200"]) == 0
    assert "The protocols differ" in capsys.readouterr().out


def test_seeds_of_two_methods_are_not_one_side(tmp_path):
    write_run(tmp_path / "a" / "x", make_ranks(0.5, 0), method="seps")
    write_run(tmp_path / "a" / "y", make_ranks(0.5, 1), method="laps")
    runs = stored_results(tmp_path / "a")
    with pytest.raises(InputError, match="mixes results of method laps and seps"):
        compare_results(runs, runs)


def test_missing_and_stale_files_say_so(tmp_path):
    with pytest.raises(InputError, match=r"neither a results.json nor folders"):
        stored_results(tmp_path)
    folder = tmp_path / "run"
    write_run(folder, make_ranks(0.5, 0))
    write_ranks(folder / ranks_file("f30k_1k"), make_ranks(0.6, 5))
    with pytest.raises(InputError, match="of two evaluations"):
        stored_results(folder)
    (folder / ranks_file("f30k_1k")).write_bytes(b"PK")
    with pytest.raises(InputError, match="no whole file of ranks"):
        stored_results(folder)
    (folder / ranks_file("f30k_1k")).unlink()
    with pytest.raises(InputError, match="evaluate once more"):
        stored_results(folder)
    (folder / "results.json").write_text('{"f30k_1k": {"rsum": 1.0}}')
    with pytest.raises(InputError, match="names no per-query ranks"):
        stored_results(folder)


@pytest.mark.parametrize("damage", [lambda raw: raw[:200], lambda raw: raw[:60] + b"x" * 40])
def test_a_damaged_file_of_ranks_is_one_sentence(tmp_path, damage):
    path = tmp_path / "ranks.npz"
    write_ranks(path, query_ranks(np.eye(50), 1))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="no whole file of ranks"):
        read_ranks(path)
