"""Searching pictures: exact scores, what changes in a folder, kills, parts, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch

from lib.batch import Tokens
from lib.errors import InputError
from lib.retrieval import search as search_module
from lib.retrieval.index import Part, PictureIndex, find_pictures
from tools.opened import open_checkpoint
from tools.search import main, read_part

pytest.importorskip("faiss")
QUERY = "a big red star above a blue ring"


def index(photos, checkpoint, out, *flags) -> int:
    flags = ["--workers", "0", "--batch_size", "5", *flags]
    return main(["index", str(photos), "--checkpoint", str(checkpoint), "--out", str(out), *flags])


def searched(capsys, out, *flags) -> list[list[str]]:
    capsys.readouterr()
    assert main(["query", str(out), *flags]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("method", ["seps", "laps", "scan", "vse", "avse", "seps_released"])
def test_scores_are_the_method_s_own(method, photos, make_checkpoint, tmp_path, capsys):
    flags = {"dense_side": "none"} if method == "seps" else {}
    checkpoint = make_checkpoint(method, **flags)
    for number, name in enumerate(find_pictures(photos)):  # plain ones have patches that tie
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        cv2.imwrite(str(photos / name), noise)
    assert index(photos, checkpoint, tmp_path / "index") == 0
    lines = searched(capsys, tmp_path / "index", QUERY, "--top", "12")
    opened = open_checkpoint(checkpoint)
    if opened.model.dense_owner:
        opened.model.leave_out_dense()
    files = find_pictures(photos)
    with torch.inference_mode():
        batch, _, _ = next(opened.photos([str(photos / one) for one in files]))
        texts = opened.model.encode_text_batch(opened.captions([QUERY]))
        scores = opened.model.similarity(opened.model.encode_image_batch(batch), texts)[:, 0]
    wanted = dict(zip(files, scores.tolist(), strict=True))
    got = {line[2]: float(line[1]) for line in lines[:12]}
    assert got.keys() == wanted.keys()
    worst = max(abs(got[path] - wanted[path]) for path in wanted)
    assert worst < 5e-3, worst
    assert [float(line[1]) for line in lines[:12]] == sorted(got.values(), reverse=True)
    assert "all 12 pictures were scored exactly" in " ".join(lines[-1])


def test_int8_scores_lie_near(photos, seps_checkpoint, tmp_path, capsys):
    for store in ("float16", "int8"):
        index(photos, seps_checkpoint, tmp_path / store, "--store", store)
    found = [searched(capsys, tmp_path / store, QUERY)[:10] for store in ("float16", "int8")]
    scores = [{line[2]: float(line[1]) for line in lines} for lines in found]
    assert all(
        abs(scores[0][path] - scores[1][path]) < 0.03 for path in scores[0] if path in scores[1]
    )


def test_new_changed_and_deleted_files(photos, seps_checkpoint, tmp_path, capsys):
    out = tmp_path / "index"
    index(photos, seps_checkpoint, out)
    assert "12 new pictures, 0 changed, 0 deleted, 0 unchanged" in capsys.readouterr().out
    names = sorted(find_pictures(photos))
    (photos / names[0]).rename(photos / "renamed.jpg")
    (photos / names[1]).write_bytes((photos / names[2]).read_bytes())
    os.utime(photos / names[3])  # touched, not changed
    index(photos, seps_checkpoint, out)
    assert "1 new pictures, 1 changed, 1 deleted, 10 unchanged" in capsys.readouterr().out
    lines = searched(capsys, out, QUERY, "--top", "20")
    scores = {line[2]: line[1] for line in lines[:12]}
    assert names[0] not in scores
    assert "renamed.jpg" in scores
    assert scores[names[1]] == scores[names[2]]
    index(photos, seps_checkpoint, out)
    assert "0 new pictures, 0 changed, 0 deleted, 12 unchanged" in capsys.readouterr().out


def test_rows_of_changed_pictures_are_given_back(photos, seps_checkpoint, tmp_path, capsys):
    out, names = tmp_path / "index", sorted(find_pictures(photos))
    index(photos, seps_checkpoint, out)
    wanted = searched(capsys, out, QUERY, "--top", "20")[:12]

    def changed(count: int, *flags) -> str:
        before = [(photos / name).read_bytes() for name in names[:count]]
        for way in (before[::-1], before):
            for name, content in zip(names, way, strict=False):
                (photos / name).write_bytes(content + b"\0" * (way is not before))
            assert index(photos, seps_checkpoint, out, *flags) == 0
        return capsys.readouterr().out

    assert "given back" not in changed(2)  # 4 rows of 16 are dead
    assert PictureIndex.open(out).rows_on_disk == 16
    assert "the rows of 6 changed or deleted pictures were given back" in changed(2)
    assert "given back" in changed(1, "--compact")
    assert PictureIndex.open(out).rows_on_disk == 12
    assert searched(capsys, out, QUERY, "--top", "20")[:12] == wanted


def test_a_broken_picture_is_named_and_skipped(photos, seps_checkpoint, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert index(photos, seps_checkpoint, tmp_path / "index") == 0
    assert "broken.jpg" in capsys.readouterr().out
    assert len(PictureIndex.open(tmp_path / "index")) == 12


def test_another_checkpoint_or_setting_is_refused(photos, make_checkpoint, tmp_path, capsys):
    first, second = (make_checkpoint("laps", seed=seed) for seed in (0, 1))
    out = tmp_path / "index"
    index(photos, first, out)
    assert index(photos, second, out) == 2
    assert "was made with checkpoint" in capsys.readouterr().err
    assert index(photos, first, out, "--store", "int8") == 2
    assert main(["query", str(out), QUERY, "--checkpoint", str(second)]) == 2
    assert "was made with checkpoint" in capsys.readouterr().err


def test_bad_input_is_a_sentence(photos, seps_checkpoint, tmp_path, capsys):
    out = tmp_path / "index"
    assert main(["query", str(out), QUERY]) == 2
    assert "is no index" in capsys.readouterr().err
    assert index(tmp_path / "nowhere", seps_checkpoint, out) == 2
    index(photos, seps_checkpoint, out)
    assert main(["query", str(out)]) == 2
    assert main(["query", str(out), "Ж"]) == 2
    assert "no word" in capsys.readouterr().err
    assert index(photos, seps_checkpoint, tmp_path / "photos") == 2
    assert index(photos, seps_checkpoint, out, "--part", "3/2") == 2


def test_parts_written_apart_are_one_index(photos, seps_checkpoint, tmp_path, capsys):
    for number in (1, 2, 3):
        index(photos, seps_checkpoint, tmp_path / "parts", "--part", f"{number}/3")
        index(photos, seps_checkpoint, tmp_path / f"apart{number}", "--part", f"{number}/3")
    index(photos, seps_checkpoint, tmp_path / "whole")
    apart = [str(tmp_path / f"apart{number}") for number in (1, 2, 3)]
    assert main(["merge", *apart, "--out", str(tmp_path / "merged")]) == 0
    found = [searched(capsys, tmp_path / one, QUERY)[:10] for one in ("whole", "parts", "merged")]
    assert found[0] == found[1] == found[2]


def test_torchrun_and_slurm_number_the_parts(monkeypatch):
    assert read_part(None) == Part(1, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    assert read_part(None) == Part(3, 4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "8")
    assert read_part(None) == Part(3, 4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "11")  # --array=5,7,9,11
    with pytest.raises(InputError, match="4 tasks numbered 5 to 11, some left out"):
        read_part(None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_part(None) == Part(1, 2)
    assert read_part("2/9") == Part(2, 9)


def test_the_shortlist_is_checked_and_fitted(
    photos, seps_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(search_module, "SHORTLIST", 4)
    monkeypatch.setattr("tools.search.SHORTLIST", 4)
    captions = tmp_path / "captions.txt"
    captions.write_text("a red star\na blue ring\na small green heart\n")
    out = tmp_path / "index"
    assert index(photos, seps_checkpoint, out, "--captions", str(captions)) == 0
    assert "fitted to 3 captions" in capsys.readouterr().out
    assert (out / "query_map.npy").exists()
    last = " ".join(searched(capsys, out, QUERY, "--top", "3")[-1])
    assert "of the exact top 3, checked against all of the 8 others" in last


def test_dense_texts_are_read_or_done_without(photos, make_checkpoint, tmp_path, capsys):
    checkpoint = make_checkpoint("seps", dense_side="image")
    assert index(photos, checkpoint, tmp_path / "without") == 0
    said = capsys.readouterr().out
    assert "tools.describe" in said
    assert "--dense_side none" in said
    lines = [f'{{"file_name": "{one}", "text": "a red star"}}' for one in find_pictures(photos)]
    dense = tmp_path / "dense.jsonl"
    dense.write_text("\n".join(lines))
    assert index(photos, checkpoint, tmp_path / "with", "--dense", str(dense)) == 0
    assert PictureIndex.open(tmp_path / "with").manifest["dense_side"] == "image"
    found = [searched(capsys, tmp_path / one, QUERY)[0][1] for one in ("without", "with")]
    assert found[0] != found[1]
    name = sorted(find_pictures(photos))[5]  # a similar picture is found without its dense text
    similar = searched(capsys, tmp_path / "with", "--image", str(photos / name))
    assert similar[0][2] == name
    lists = ["--image", str(photos / name), "--captions", str(dense)]
    assert main(["query", str(tmp_path / "with"), *lists]) == 2
    assert "with --dense" in capsys.readouterr().err
    dense.write_text("\n".join(lines[1:]))
    assert index(photos, checkpoint, tmp_path / "some", "--dense", str(dense)) == 2
    matching = make_checkpoint("seps", dense_side="image", dense_match="max_mean")
    assert index(photos, matching, tmp_path / "matching") == 2
    assert "--dense_match" in capsys.readouterr().err


def test_a_photo_finds_itself_and_its_captions(photos, seps_checkpoint, tmp_path, capsys):
    out = tmp_path / "index"
    index(photos, seps_checkpoint, out)
    name = sorted(find_pictures(photos))[5]
    assert searched(capsys, out, "--image", str(photos / name))[0][2] == name
    captions = tmp_path / "captions.txt"
    captions.write_text("a red star\na blue ring\n")
    lines = searched(capsys, out, "--image", str(photos / name), "--captions", str(captions))
    assert {" ".join(line[2:]) for line in lines} == {"a red star", "a blue ring"}
    assert main(["query", str(out), "--image", str(captions)]) == 2


def test_a_damaged_shard_is_named(photos, seps_checkpoint, tmp_path, capsys):
    out = tmp_path / "index"
    index(photos, seps_checkpoint, out)
    (file,) = (out / "shards").glob("*/records.npy")
    file.write_bytes(file.read_bytes()[:200])
    assert main(["query", str(out), QUERY]) == 2
    assert "records.npy can't be read" in capsys.readouterr().err


def test_no_file_outside_the_folder_is_named(photos, seps_checkpoint, tmp_path):
    out = tmp_path / "index"
    index(photos, seps_checkpoint, out)
    (entries,) = (out / "shards").glob("*/entries.jsonl")
    entries.write_text(entries.read_text().replace('"path": "', '"path": "../', 1))
    found = PictureIndex.open(out)
    bad = [row for row, one in enumerate(found.pictures) if one.path.startswith("..")]
    with pytest.raises(ValueError, match="outside"):
        found.file(bad[0])


def test_two_writers_of_one_part_are_kept_apart(photos, seps_checkpoint, tmp_path, capsys):
    out = tmp_path / "index"
    index(photos, seps_checkpoint, out)
    with PictureIndex.open(out).writing(Part()):
        assert index(photos, seps_checkpoint, out) == 2
    assert "another process" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_loses_the_open_shard_alone(photos, seps_checkpoint, tmp_path, capsys):
    out = tmp_path / "index"
    code = (
        "import sys, time; from lib.retrieval import search; search.SHARD_PICTURES = 3;"
        "add = search._Shard.write\n"
        "def slow(self, gone):\n    add(self, gone); time.sleep(1)\n"
        "search._Shard.write = slow\n"
        "from tools.search import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--workers", "0", "--batch_size", "3"]
    command = ["index", str(photos), "--checkpoint", str(seps_checkpoint), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-c", code, *command, *flags])
    deadline = time.time() + 120
    while not list(out.glob("shards/[0-9]*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(PictureIndex.open(out))
    assert 0 < kept < 12
    index(photos, seps_checkpoint, out)
    assert f"{12 - kept} new pictures" in capsys.readouterr().out
    assert len(PictureIndex.open(out)) == 12


def test_vectors_fit_tokens_without_cls_and_with_dense(tmp_path):
    from lib.retrieval.vectors import QueryMap, image_vectors

    mask = torch.ones(1, 3, dtype=torch.bool)
    text = Tokens(torch.randn(1, 3, 4), mask)
    for cls, dense in [(None, None), (torch.randn(1, 1, 4), text)]:
        image = Tokens(torch.randn(1, 3, 4), mask, cls, dense)
        query, vectors = QueryMap()(text, image), image_vectors(image, matches_dense=True)
        assert query.shape[1] == vectors.shape[1]
        assert np.isfinite(query @ vectors.numpy().T).all()
