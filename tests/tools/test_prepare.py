"""tools.prepare as a user runs it: what lands in the folder, guards, and kill -9 in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.data.splits import load_split
from tests.data.prepare.pictures import (
    caption_csv,
    captions_of,
    jpeg,
    karpathy_json,
    picture_folder,
    write_shard,
)
from tools import prepare

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("imagehash")


@pytest.fixture
def pets(tmp_path) -> list[str]:
    """Twenty pictures, two of them one picture, and the call that prepares them as `pets`."""
    names = picture_folder(tmp_path / "pics")
    (tmp_path / "pics" / "p07.jpg").write_bytes(jpeg(3, quality=70))
    caption_csv(tmp_path / "captions.csv", names)
    argv = ["folder", str(tmp_path / "pics"), "--captions", str(tmp_path / "captions.csv")]
    return [*argv, "--dataset", "pets", "--data_path", str(tmp_path / "data")]


def texts(folder: Path) -> dict[str, str]:
    """What is written, without the record of how."""
    kinds = (*folder.glob("*.txt"), *folder.glob("*.jsonl"), folder / "id_mapping.json")
    return {path.name: path.read_text() for path in kinds}


def test_a_folder_becomes_a_data_set(pets, tmp_path, capsys):
    assert prepare.main(pets) == 0
    printed = capsys.readouterr().out
    assert "image is column 'image', caption 'caption'" in printed
    assert "2 images are near-duplicates in 1 groups" in printed
    assert "splits drawn by image, 0.8/0.1/0.1, seed 0" in printed
    assert "train       16 images        32 captions" in printed
    assert "python train.py --dataset pets" in printed
    splits = {
        name: load_split(tmp_path / "data", "pets", name) for name in ("train", "dev", "test")
    }
    assert [len(one.image_ids) for one in splits.values()] == [16, 2, 2]
    of = {image: name for name, split in splits.items() for image in split.image_ids}
    assert of["p03"] == of["p07"]
    test = splits["test"]
    for caption, row in zip(test.captions, test.caption_image, strict=True):
        assert caption in captions_of(os.path.basename(test.image_files[row]))
    link = tmp_path / "data" / "pets" / "images" / "p00.jpg"
    assert link.is_symlink()
    assert link.read_bytes() == jpeg(0)
    assert not (tmp_path / "data" / "pets" / ".prepare").exists()


def test_nothing_is_overwritten_without_being_told(pets, tmp_path, capsys):
    assert prepare.main(pets) == 0
    before = texts(tmp_path / "data" / "pets")
    assert prepare.main(pets) == 0
    assert "finished already" in capsys.readouterr().out
    assert prepare.main([*pets, "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert "is there already" in told
    assert "--overwrite 1" in told
    assert texts(tmp_path / "data" / "pets") == before
    dense = tmp_path / "data" / "pets" / "pets_train.jsonl"
    dense.write_text('{"image_id": "p00", "text": "a"}\n')
    assert prepare.main([*pets, "--seed", "1", "--overwrite", "1"]) == 0
    assert "pets_train.jsonl is kept" in capsys.readouterr().out
    after = texts(tmp_path / "data" / "pets")
    assert after["train_ids.txt"] != before["train_ids.txt"]
    assert after["pets_train.jsonl"] == '{"image_id": "p00", "text": "a"}\n'


def test_files_of_others_are_not_touched(pets, tmp_path, capsys):
    folder = tmp_path / "data" / "pets"
    folder.mkdir(parents=True)
    (folder / "dev_caps.txt").write_text("mine\n")
    assert prepare.main(pets) == 2
    assert "dev_caps.txt is there already" in capsys.readouterr().err
    (folder / "dev_caps.txt").unlink()
    (folder / "images").mkdir()
    (folder / "images" / "p05.jpg").write_bytes(b"mine")
    assert prepare.main(pets) == 2
    assert "p05.jpg is there already and is another file" in capsys.readouterr().err
    assert (folder / "images" / "p05.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("link", ["symlink", "hardlink", "copy"])
def test_images_are_linked_or_copied_and_never_changed(pets, tmp_path, link):
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pics").iterdir()}
    assert prepare.main([*pets, "--link", link]) == 0
    image = tmp_path / "data" / "pets" / "images" / "p01.jpg"
    source = tmp_path / "pics" / "p01.jpg"
    assert image.is_symlink() == (link == "symlink")
    assert image.samefile(source) == (link != "copy")
    assert image.read_bytes() == jpeg(1)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pics").iterdir()} == before


def test_images_may_lie_in_their_place_already(tmp_path, capsys):
    names = picture_folder(tmp_path / "data" / "pets" / "images", 10)
    captions = caption_csv(tmp_path / "a.csv", names)
    argv = ["folder", str(tmp_path / "data" / "pets" / "images"), "--captions", str(captions)]
    argv += ["--dataset", "pets", "--data_path", str(tmp_path / "data"), "--overwrite", "1"]
    assert prepare.main(argv) == 0
    assert (tmp_path / "data" / "pets" / "images" / "p00.jpg").read_bytes() == jpeg(0)


def test_given_splits_stay_and_torn_duplicates_are_told(pets, tmp_path, capsys):
    rows = [f"p{n:02d}.jpg,text {n},{'train' if n < 16 else 'val' if n < 18 else 'test'}"
            for n in range(20)]  # fmt: skip
    (tmp_path / "pics" / "p19.jpg").write_bytes(jpeg(0, quality=60))
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption,split", *rows]) + "\n")
    assert prepare.main(pets) == 0
    assert (
        "1 groups of near-duplicates lie in several of the given splits" in capsys.readouterr().out
    )
    assert load_split(tmp_path / "data", "pets", "dev").image_ids == ["p16", "p17"]
    (tmp_path / "captions.csv").write_text(
        "\n".join(["image,caption,split", *rows[:-1], "p19.jpg,x,"])
    )
    assert prepare.main([*pets, "--overwrite", "1"]) == 2
    assert "19 of 20 images come with a split" in capsys.readouterr().err


def test_karpathys_files_keep_their_names_and_the_testall_of_coco(tmp_path, capsys):
    for dataset, name, stem in (("flickr30k", "f30k", "test"), ("coco", "coco", "testall")):
        path = karpathy_json(tmp_path / f"{dataset}.json", dataset)
        argv = ["karpathy", str(path), "--data_path", str(tmp_path), "--check_counts", "0"]
        assert prepare.main(argv) == 0
        assert (tmp_path / name / f"{stem}_caps.txt").exists()
        split = load_split(tmp_path, name, "test", check_images=False)
        assert split.image_ids == (["8", "9"] if name == "f30k" else ["1008", "1009"])


def test_an_undecodable_image_is_left_out_and_told(pets, tmp_path, capsys):
    (tmp_path / "pics" / "p02.jpg").write_bytes(b"\xff\xd8 no")
    assert prepare.main(pets) == 0
    assert "1 images do not decode and are left out (p02.jpg)" in capsys.readouterr().out
    assert "p02" not in (tmp_path / "data" / "pets" / "id_mapping.json").read_text()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dataset", "a/b"], "choose a plain name"),
        (["--dataset", "scenes"], "not scenes"),
        (["--split", "1/2/3"], "add up to 1"),
        (["--captions", "nowhere.csv"], "no file nowhere.csv"),
        (["--image_column", "x"], "no column x"),
    ],
)
def test_bad_flags_are_one_sentence(pets, flags, told, capsys):
    assert prepare.main([*pets, *flags]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 1


def killed_in_the_middle(argv: list[str], journal: Path, lines: int) -> None:
    """Run the tool and send it SIGKILL once its journal has some lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.prepare", *argv], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait(60) == -signal.SIGKILL


def test_kill_9_while_shards_are_read_loses_nothing(tmp_path):
    pytest.importorskip("webdataset")
    for number in range(3):
        write_shard(tmp_path / f"s-{number}.tar", list(range(300 * number, 300 * number + 300)))
    argv = ["webdataset", str(tmp_path / "s-{0..2}.tar"), "--near", "off"]
    argv += ["--dataset", "web", "--data_path"]
    assert prepare.main([*argv, str(tmp_path / "whole")]) == 0
    journal = tmp_path / "data" / "web" / ".prepare" / "samples.jsonl"
    killed_in_the_middle([*argv, str(tmp_path / "data")], journal, 350)
    before = journal.read_text()
    assert 350 <= before.count("\n") < 902
    first = tmp_path / "data" / "web" / "images" / "s-0" / "00000.jpg"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "data" / "web" / "train_caps.txt").exists()
    assert prepare.main([*argv, str(tmp_path / "data")]) == 0
    assert first.stat().st_mtime_ns == written
    assert texts(tmp_path / "data" / "web") == texts(tmp_path / "whole" / "web")
    images = sorted((tmp_path / "data" / "web" / "images").rglob("*.jpg"))
    assert len(images) == 900
    assert images[-1].read_bytes() == jpeg(899)


def test_kill_9_while_images_are_hashed_goes_on_there(tmp_path):
    names = picture_folder(tmp_path / "pics", 400)
    captions = caption_csv(tmp_path / "a.csv", names)
    argv = ["folder", str(tmp_path / "pics"), "--captions", str(captions), "--dataset", "pets"]
    assert prepare.main([*argv, "--data_path", str(tmp_path / "whole")]) == 0
    argv += ["--data_path", str(tmp_path / "data")]
    journal = tmp_path / "data" / "pets" / ".prepare" / "hashes.jsonl"
    killed_in_the_middle(argv, journal, 50)
    done = journal.read_text().count("\n")
    assert 50 <= done < 400
    assert (
        json.loads((tmp_path / "data" / "pets" / "prepare.json").read_text())["finished"] is False
    )
    assert prepare.main(argv) == 0
    assert texts(tmp_path / "data" / "pets") == texts(tmp_path / "whole" / "pets")
