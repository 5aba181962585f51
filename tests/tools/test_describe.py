"""tools.describe as a user runs it: splits, folders, parts, kill -9, and training on its texts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

pytest.importorskip("openai")
pytest.importorskip("imagehash")

from lib.data.splits import load_split
from tests.data.describe.server import ChatServer, error, said
from tests.data.describe.tiny_llava import save_tiny_llava
from tests.data.prepare.pictures import caption_csv, picture_folder
from tools import describe, prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pets(tmp_path, capsys) -> list[str]:
    """A prepared data set of 30 pictures; the flags that name it."""
    names = picture_folder(tmp_path / "pics", 30)
    captions = caption_csv(tmp_path / "a.csv", names)
    where = ["--dataset", "pets", "--data_path", str(tmp_path / "data")]
    argv = ["folder", str(tmp_path / "pics"), "--captions", str(captions), "--near", "off"]
    assert prepare.main([*argv, *where]) == 0
    capsys.readouterr()
    return where


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_split_gets_the_texts_that_training_reads(pets, tmp_path, capsys):
    with ChatServer(lambda number, request: said(f"text {number}")) as server:
        assert describe.main([*pets, "--base_url", server.url]) == 0
        printed = capsys.readouterr().out
        assert "train: 24 texts written, 0 were there" in printed
        assert "dev: 3 texts written" in printed
        assert describe.main([*pets, "--base_url", server.url]) == 0
        assert len(server.requests) == 30
    split = load_split(tmp_path / "data", "pets", "dev", needs_dense=True)
    assert len(split.dense) == 3
    assert lines(tmp_path / "data" / "pets" / "pets_dev.jsonl")[0]["model"] == "tiny-vlm"


def test_failures_end_with_1_and_the_same_command_mends_them(pets, tmp_path, capsys):
    def behave(number, request):
        return said("I'm sorry, no." if number == 1 else "well")

    argv = [*pets, "--split", "dev", "--concurrency", "1"]
    with ChatServer(behave) as server:
        argv += ["--base_url", server.url]
        assert describe.main(argv) == 1
        printed = capsys.readouterr().out
        assert "refused: I'm sorry, no." in printed
        assert "pets_dev.failed.jsonl; the same command tries them again" in printed
        assert describe.main(argv) == 0
    assert len(lines(tmp_path / "data" / "pets" / "pets_dev.jsonl")) == 3
    assert not (tmp_path / "data" / "pets" / "pets_dev.failed.jsonl").exists()


def test_a_server_that_fails_for_all_stops_early(pets, capsys):
    with ChatServer(lambda number, request: error(400, "this model reads no images")) as server:
        argv = [*pets, "--split", "train", "--base_url", server.url, "--concurrency", "1"]
        assert describe.main(argv) == 1
    assert len(server.requests) == 20
    assert "20 images in a row got no answer" in capsys.readouterr().out


def test_only_photos_captions_for_them_and_the_way_to_a_data_set(tmp_path, capsys):
    picture_folder(tmp_path / "pics" / "sub", 10)
    out = tmp_path / "captions.jsonl"
    with ChatServer(lambda number, request: said(f"photo {number}")) as server:
        argv = ["--images", str(tmp_path / "pics"), "--out", str(out), "--base_url", server.url]
        assert describe.main([*argv, "--prompt", "One sentence."]) == 0
        assert server.requests[0]["messages"][0]["content"][1]["text"] == "One sentence."
    assert {one["file_name"] for one in lines(out)} == {f"sub/p{n:02d}.jpg" for n in range(10)}
    argv = ["folder", str(tmp_path / "pics"), "--captions", str(out), "--dataset", "mine"]
    assert prepare.main([*argv, "--data_path", str(tmp_path / "data")]) == 0
    assert "image is column 'file_name', caption 'text'" in capsys.readouterr().out
    assert len(load_split(tmp_path / "data", "mine", "train").captions) == 8


@pytest.mark.skipif(transformers.__version__ < "5", reason="the backend needs transformers 5")
def test_the_transformers_backend_through_the_tool(pets, tmp_path):
    folder = save_tiny_llava(tmp_path / "llava")
    argv = [*pets, "--split", "dev", "--model", str(folder), "--max_new_tokens", "8"]
    assert describe.main([*argv, "--temperature", "1", "--dtype", "fp32"]) in (0, 1)
    path = tmp_path / "data" / "pets" / "pets_dev.jsonl"
    failed = path.with_name("pets_dev.failed.jsonl")
    written = lines(path) if path.exists() else []
    listed = lines(failed) if failed.exists() else []  # a random model's text may be empty
    assert len(written) + len(listed) == 3
    assert all(one["model"] == str(folder) for one in written)


def test_kill_9_loses_only_what_was_in_flight_and_doubles_nothing(pets, tmp_path):
    path = tmp_path / "data" / "pets" / "pets_train.jsonl"
    with ChatServer(lambda number, request: said(f"text {number}", delay=0.05)) as server:
        argv = [*pets, "--split", "train", "--base_url", server.url, "--concurrency", "3"]
        for least in (5, 12):
            kill_once_written([sys.executable, "-m", "tools.describe", *argv], path, least)
        before = lines_that_are_whole(path)
        assert 12 <= len(before) < 24
        assert describe.main(argv) == 0
        assert len(server.requests) <= 24 + 2 * 3 + 2  # each kill lost at most three, and no text
    after = lines(path)
    assert after[: len(before)] == before
    assert sorted(one["image_id"] for one in after) == sorted({one["image_id"] for one in after})
    assert len(after) == 24


def kill_once_written(command: list[str], path: Path, least: int) -> None:
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= least:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(60) == -signal.SIGKILL


def lines_that_are_whole(path: Path) -> list[dict]:
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give either --dataset NAME or --images DIR"),
        (["--dataset", "nowhere"], "--dataset nowhere: no folder"),
        (["--dataset", "pets", "--split", "val"], "choose from train, dev, test"),
        (["--dataset", "pets", "--part", "3/2"], "--part 3/2"),
        (["--dataset", "pets", "--top_p", "0"], "--top_p 0.0: give"),
        (["--dataset", "pets", "--limit", "0"], "--limit 0"),
        (["--images", "."], "--images needs --out"),
    ],
)
def test_bad_flags_are_one_sentence(pets, flags, told, capsys):
    assert describe.main([*flags, *pets[2:]]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 1
