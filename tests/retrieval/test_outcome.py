"""Ensembles, re-ranking, failure analysis and the facts of a result, by hand and end to end."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import scoring
import train
from arguments import parse_train
from lib.batch import Batch
from lib.errors import InputError, NonFiniteError
from lib.methods import served
from lib.retrieval.analysis import analyse, duplicate_rows, hub_rows, wrong_pair_rows
from lib.retrieval.ensemble import added, check_same_data, ensemble_folder, uneven_spreads
from lib.retrieval.evaluation import SplitLoaders, score_split
from lib.retrieval.gallery import Gallery
from lib.retrieval.metrics import query_ranks
from lib.retrieval.outcome import matrix_outcome
from lib.retrieval.rerank import kept_share, rerank_split, shortlist_ranks, shortlists
from lib.retrieval.result_files import read_ranks, stored_results
from tests.helpers import pair_inputs, tiny_model

CPU = torch.device("cpu")
HAND = Gallery(
    dataset="pets",
    split="test",
    captions=["a dog", "a big dog runs over the grass", "A  dog", "a cat on a table", "a fish"],
    image_ids=["d1", "d2", "c"],
    caption_images=np.array([0, 0, 1, 2, 2]),
)
SCORES = np.array(
    [
        [0.9, 0.5, 0.9, 0.1, 0.0],
        [0.8, 0.6, 0.8, 0.3, 0.2],
        [0.7, 0.1, 0.2, 0.4, 0.1],
    ]
)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- by hand ------------------------------------------------------------------------------------


def test_hubs_wrong_pairs_and_duplicates_by_hand():
    hubs = {(row["direction"], row["item"]): row["at_rank_1"] for row in hub_rows(HAND, SCORES)}
    assert hubs["t2i", "d1"] == 2  # of captions 0 and 2
    assert hubs["t2i", "d2"] == 2  # of captions 1 and 4
    assert hubs["t2i", "c"] == 1
    assert hubs["i2t", "a dog"] == 3
    first = wrong_pair_rows(HAND, SCORES)[0]
    assert (first["image"], first["caption"], first["image_of_caption"]) == ("d1", "A  dog", "d2")
    assert (first["score"], first["score_there"]) == (pytest.approx(0.9), pytest.approx(0.8))
    assert len(wrong_pair_rows(HAND, SCORES)) == 10
    assert duplicate_rows(HAND) == [{"caption": "a dog", "images": 2, "image_ids": "d1 d2"}]


def test_the_analysis_by_hand(tmp_path):
    ranks = query_ranks(SCORES, caption_images=HAND.caption_images)
    lines = analyse(tmp_path / "new" / "folder", HAND, SCORES, ranks)
    folder = tmp_path / "new" / "folder"
    queries = rows_of(folder / "ranks.csv")
    assert [int(row["rank"]) for row in queries] == [*ranks.i2t, *ranks.t2i]
    assert [row["direction"] for row in queries] == ["i2t"] * 3 + ["t2i"] * 5
    assert (queries[0]["right"], queries[0]["best_wrong"]) == ("a dog", "A  dog")
    assert (queries[7]["right"], queries[7]["best_wrong"]) == ("c", "d2")
    lengths = {row["words"]: row for row in rows_of(folder / "by_length.csv")}
    assert {name: int(row["captions"]) for name, row in lengths.items()} == {"1-7": 5}
    counts = {row["captions_per_image"]: row for row in rows_of(folder / "by_captions.csv")}
    assert counts["1"]["images"] == "1"
    assert counts["2"]["images"] == "2"
    assert float(counts["1"]["t2i_r1"]) == 0.0  # caption 2 prefers image d1
    page = (folder / "README.md").read_text()
    assert all(line in page for line in lines)
    assert any("share word for word: 1" in line for line in lines)


def test_matrices_are_added():
    one, two = np.ones((2, 4), np.float32), np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(added([one, two]), one + two)
    np.testing.assert_array_equal(added([one, two], [2.0, 0.5]), 2 * one + two / 2)
    with pytest.raises(InputError, match=r"\(2, 4\) and \(4, 2\)"):
        added([one, two.T])
    assert uneven_spreads(["a", "b"], [two, 2 * two]) is None
    assert "b spreads 50 times wider than a" in uneven_spreads(["a", "b"], [two, 50 * two])
    assert uneven_spreads(["a", "b"], [two, 50 * two], [5.0, 0.1]) is None
    assert "a spreads 10 times wider than b" in uneven_spreads(["a", "b"], [two, two], [1, 0.1])


def test_members_that_scored_other_data_are_refused():
    one = {"split": "test", "captions_sha256": "a", "ids_sha256": "b"}
    check_same_data(["x", "y"], [one, dict(one)])
    with pytest.raises(InputError, match="x and z differ in the captions' words or order; they"):
        check_same_data(["x", "y", "z"], [one, one, {**one, "captions_sha256": "c"}])


def test_no_two_ensembles_share_a_folder(tmp_path):
    def folder(*names):
        return ensemble_folder(tmp_path, [tmp_path / name for name in names], "best.pth")

    home = tmp_path / "ensembles"
    assert folder("a/best.pth", "b/best.pth") == home / "a+b"
    others = [
        folder("a/best.pth", "b/last.pth"),
        folder("a/seed0/best.pth", "b/seed0/best.pth"),
        folder("c/seed0/best.pth", "b/seed0/best.pth"),
        folder("a+b/best.pth", "c/best.pth"),
        folder("a/best.pth", "b+c/best.pth"),
        folder(*(f"{'long' * 9}{row}/best.pth" for row in range(9))),
    ]
    assert len({home / "a+b", *others}) == 7
    assert all(one.parent == home and len(one.name) < 200 for one in others)


def test_shortlists_and_what_they_kept_by_hand():
    cosines = np.array([[0.9, 0.1, 0.8, 0.2], [0.0, 0.5, 0.7, 0.3]])
    lists = shortlists(cosines, 2)
    assert lists["i2t"].tolist() == [[True, False, True, False], [False, True, True, False]]
    assert shortlists(cosines, 1)["t2i"].tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    exact = np.array([[1.0, 9.0, 2.0, 0.0], [0.0, 3.0, 2.0, 1.0]])
    assert kept_share(exact, lists["i2t"])[1] == 50.0  # row 0's best is not on its list


def test_a_right_candidate_off_the_list_ranks_behind_it():
    exact = np.array([[5.0, 4.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    cosines = np.array([[0.1, 0.9, 0.8], [0.2, 0.9, 0.1], [0.0, 0.1, 0.9]])
    found = shortlist_ranks(exact, cosines, shortlists(cosines, 2), np.arange(3))
    assert found.i2t.tolist() == [3, 1, 1]  # caption 0 is not among the two by cosine
    assert query_ranks(exact, 1).i2t.tolist() == [1, 2, 1]


def test_a_matrix_that_is_not_finite_is_an_error():
    broken = SCORES.copy()
    broken[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="1 of 15"):
        matrix_outcome(HAND, broken)


# --- with models --------------------------------------------------------------------------------


def loaders_of(method, pairs=6):
    inputs = pair_inputs(pairs, method=method)
    dense = {k: v for k, v in inputs.items() if k.startswith("dense")}
    model = tiny_model(method)
    images = Batch(pixels=inputs["pixels"], **(dense if model.dense_owner == "image" else {}))
    captions = Batch(ids=inputs["ids"], lengths=inputs["lengths"])
    return model, SplitLoaders([images], [captions], np.arange(pairs), pairs)


@pytest.mark.parametrize("method", ["laps", "seps", "vse", "dense_text"])
def test_a_list_of_everything_gives_the_exact_ranks(method):
    model, loaders = loaders_of(method)
    exact = score_split(model, loaders, CPU, torch.no_grad, False).matrix
    found = rerank_split(model, loaders, CPU, torch.no_grad, 100, False)
    ranks = query_ranks(exact, 1)
    np.testing.assert_array_equal(found.ranks.i2t, ranks.i2t)
    np.testing.assert_array_equal(found.ranks.t2i, ranks.t2i)
    assert found.pairs == 36
    assert all(share == 100.0 for way in found.kept.values() for share in way.values())


def test_a_short_list_scores_fewer_pairs():
    model, loaders = loaders_of("laps")
    found = rerank_split(model, loaders, CPU, torch.no_grad, 2, False)
    assert 12 <= found.pairs <= 24
    assert found.kept["i2t"][1] < 100.0 or found.kept["t2i"][10] < 100.0


def test_embeddings_without_a_common_space_are_refused():
    model, loaders = loaders_of("avse")
    with pytest.raises(InputError, match="avse has no global embedding that images and captions"):
        rerank_split(model, loaders, CPU, torch.no_grad, 2, False)


# --- end to end ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_path):
    folder = tmp_path_factory.mktemp("runs") / "scenes_laps"
    argv = ["--dataset", "scenes", "--data_path", str(scenes_path), "--num_epochs", "1"]
    argv += ["--scenes_size", "32,16,16", "--img_res", "64", "--batch_size", "16", "--workers", "0"]
    assert train.main([*argv, "--method", "laps", "--logger_name", str(folder)]) == 0
    return folder


def evaluate(run, scenes_path, *flags):
    data = ["--data_path", str(scenes_path), "--workers", "0"]
    return evaluation.main([*data, "--checkpoint", str(run / "model_best.pth"), *flags])


def test_results_say_what_made_them(run, scenes_path):
    assert evaluate(run, scenes_path, "--recall_at", "1,5,10,50", "--batch_size", "7") == 0
    table = json.loads((run / "results.json").read_text())["scenes"]
    assert table["i2t"]["r50"] >= table["i2t"]["r10"]
    assert (table["data"]["images"], table["data"]["captions"]) == (16, 80)
    assert len(table["data"]["captions_sha256"]) == 64
    assert table["trained_on"]["dataset"] == "scenes"
    assert table["flags"]["recall_at"] == [1, 5, 10, 50]
    assert table["flags"]["batch_size"] == 7
    assert "amp" not in table["flags"]  # at its default
    assert {"torch", "numpy", "python"} <= set(table["versions"])
    assert table["date"].startswith("20")
    assert (table["val_split"], table["protocol"]) == ("dev", "none")
    assert "commit" in table
    ranks = read_ranks(run / table["ranks"])
    assert ranks.metrics()["rsum"] == pytest.approx(table["rsum"])
    assert list(stored_results(run)[0]) == ["scenes"]
    assert not (run / ".unfinished_scores").exists()


def test_reranked_results_have_an_entry_of_their_own(run, scenes_path, capsys):
    assert evaluate(run, scenes_path) == 0
    exact = json.loads((run / "results.json").read_text())["scenes"]
    assert evaluate(run, scenes_path, "--rerank", "4") == 0
    tables = json.loads((run / "results.json").read_text())
    assert tables["scenes"] == exact
    assert tables["scenes_rerank4"]["approximate"]["shortlist"] == 4
    assert set(tables["scenes_rerank4"]["approximate"]["kept"]["i2t"]) == {"r1", "r5", "r10"}
    printed = capsys.readouterr().out
    assert "approximate: " in printed
    assert "of the exact top 1/5/10 the T2I shortlist kept" in printed


def test_a_control_on_shortlists_has_an_entry_of_its_own(run, scenes_path):
    assert evaluate(run, scenes_path, "--rerank", "3") == 0
    honest = json.loads((run / "results.json").read_text())["scenes_rerank3"]
    assert evaluate(run, scenes_path, "--rerank", "3", "--selection_control", "random") == 0
    tables = json.loads((run / "results.json").read_text())
    assert tables["scenes_rerank3"] == honest
    assert tables["scenes_rerank3_random"]["selection_control"] == "random"


def test_an_ensemble_of_one_model_twice_ranks_as_that_model(run, scenes_path):
    assert evaluate(run, scenes_path) == 0
    single = json.loads((run / "results.json").read_text())
    flags = ["--ensemble", str(run), str(run / "model_best.pth"), "--runs", str(run.parent)]
    data = ["--data_path", str(scenes_path), "--workers", "0"]
    assert evaluation.main([*data, *flags]) == 0
    assert json.loads((run / "results.json").read_text()) == single  # never in a single row
    home = run.parent / "ensembles" / f"{run.name}+{run.name}"
    table = json.loads((home / "results.json").read_text())["scenes_ensemble"]
    assert table["rsum"] == pytest.approx(single["scenes"]["rsum"])
    assert table["method"] == "ensemble of laps, laps"
    assert [one["checkpoint_sha256"] for one in table["members"]] == [
        single["scenes"]["checkpoint_sha256"]
    ] * 2


def test_factors_of_members_are_taken_and_told(run, scenes_path, tmp_path, capsys):
    data = ["--data_path", str(scenes_path), "--workers", "0", "--runs", str(run.parent)]
    members = ["--ensemble", str(run), str(run)]
    alone, weighed = tmp_path / "alone.npy", tmp_path / "weighed.npy"
    checkpoint = ["--checkpoint", str(run / "model_best.pth"), "--save_similarity", str(alone)]
    assert evaluation.main([*data, *checkpoint]) == 0
    asked = [*data, *members, "--ensemble_weights", "2", "0.5"]
    assert evaluation.main([*asked, "--save_similarity", str(weighed)]) == 0
    np.testing.assert_allclose(np.load(weighed), 2.5 * np.load(alone), rtol=1e-5)
    home = run.parent / "ensembles" / f"{run.name}+{run.name}"
    table = json.loads((home / "results.json").read_text())["scenes_ensemble_2_0.5"]
    assert table["flags"]["ensemble_weights"] == [2.0, 0.5]
    for wrong, told in {
        "1": "gives 1 factors, but --ensemble names 2 runs",
        "1 0": "--ensemble_weights 0.0: give a number above 0",
        "1 nan": "--ensemble_weights nan: give a number above 0",
    }.items():
        assert evaluation.main([*data, *members, "--ensemble_weights", *wrong.split()]) == 2
        assert told in capsys.readouterr().err
    assert evaluation.main([*data, *checkpoint, "--ensemble_weights", "1"]) == 2
    assert "there is no --ensemble" in capsys.readouterr().err


def test_an_ensemble_looks_at_its_own_folder_before_the_work(run, scenes_path, tmp_path, capsys):
    (tmp_path / "ensembles").write_text("no folder")
    flags = ["--ensemble", str(run), str(run), "--runs", str(tmp_path)]
    assert evaluation.main(["--data_path", str(scenes_path / "nowhere"), *flags]) == 2
    told = capsys.readouterr().err
    assert f"--save_results {tmp_path / 'ensembles'}" in told
    assert "can't be written" in told


def test_members_on_other_captions_are_told_before_the_second_is_scored(
    run, scenes_path, monkeypatch, capsys
):
    scored, seen = [], iter(("a", "b"))
    known = scoring.split_fingerprint
    monkeypatch.setattr(
        scoring, "split_fingerprint", lambda split: {**known(split), "ids_sha256": next(seen)}
    )
    monkeypatch.setattr(
        scoring, "score_split", lambda *_, **__: scored.append(1) or score_split(*_, **__)
    )
    flags = ["--ensemble", str(run), str(run), "--runs", str(run.parent), "--workers", "0"]
    assert evaluation.main(["--data_path", str(scenes_path), *flags]) == 2
    assert "differ in the image ids" in capsys.readouterr().err
    assert len(scored) == 1


def test_the_analysis_is_written(run, scenes_path, tmp_path, capsys):
    assert evaluate(run, scenes_path, "--analyse", str(tmp_path / "where")) == 0
    assert len(rows_of(tmp_path / "where" / "ranks.csv")) == 16 + 80
    assert "Images never at rank 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ensemble", "runs/a"], "at least two runs"),
        (["--ensemble", "a", "b", "--rerank", "5"], "--ensemble and --rerank don't go together"),
        (
            ["--ensemble", "a", "b", "--attention_kept", "1"],
            "--ensemble and --attention_kept don't",
        ),
        (["--ensemble", "nowhere", "b"], "--ensemble nowhere: neither a checkpoint"),
        (["--rerank", "5", "--analyse", "x"], "--analyse needs all similarities"),
        (["--rerank", "-1"], "--rerank -1"),
        (["--recall_at", "0"], "--recall_at 0"),
    ],
)
def test_flags_that_contradict_each_other(flags, message, capsys):
    assert evaluation.main(flags) == 2
    assert message in capsys.readouterr().err


def test_cxc_of_another_data_set_is_one_sentence(run, scenes_path, capsys):
    pytest.importorskip("eccv_caption")
    assert evaluate(run, scenes_path, "--evaluate_cxc", "1") == 2
    assert "COCO's test split of 25,000 captions, not for 80" in capsys.readouterr().err


def test_labels_that_train_can_not_use_are_told_before_training(monkeypatch):
    asked = ["--eval", "1", "--evaluate_eccv", "1"]
    with pytest.raises(InputError, match="--evaluate_eccv is for the image ids of --dataset coco"):
        parse_train([*asked, "--dataset", "f30k"])
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="need eccv_caption"):
        parse_train([*asked, "--dataset", "coco"])
    assert parse_train([*asked[2:], "--dataset", "f30k"]).evaluate_eccv == 1  # read by nobody


def test_a_part_of_a_split_has_an_entry_of_its_own(run, scenes_path, capsys):
    assert evaluate(run, scenes_path) == 0
    whole = json.loads((run / "results.json").read_text())["scenes"]
    assert evaluate(run, scenes_path, "--first_images", "6", "--attention_kept", "1") == 0
    tables = json.loads((run / "results.json").read_text())
    assert tables["scenes"] == whole
    part = tables["scenes_first6"]
    assert (part["images"], part["captions"]) == (6, 30)
    assert len(read_ranks(run / part["ranks"]).i2t) == 6
    assert evaluate(run, scenes_path, "--first_images", "17") == 2
    assert "the test split has 16 images, fewer than the 17" in capsys.readouterr().err


def test_attention_that_can_not_be_told_is_refused_before_the_work(
    run, scenes_path, capsys, monkeypatch
):
    def refuse(*_):
        raise InputError("SwinModel has no [CLS]")

    monkeypatch.setattr(served, "cls_attention", refuse)
    monkeypatch.setattr(scoring, "score_split", lambda *_, **__: pytest.fail("scored before"))
    assert evaluate(run, scenes_path, "--attention_kept", "1") == 2
    assert "SwinModel has no [CLS]" in capsys.readouterr().err
    with pytest.raises(InputError, match="vse keeps all it reads"):
        served.check_attention(tiny_model("vse"), precomp=False)
