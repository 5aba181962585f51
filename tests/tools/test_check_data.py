"""tools.check_data: what it finds, that it fits a screen, and that it stops where training does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import train
from tests.data.prepare.pictures import captions_of, jpeg, picture_folder
from tools import check_data

SIZES = {"train": 8, "dev": 2, "test": 2}
TINY = "--vit_type tiny --bert_path tiny --img_res 32 --embed_size 32 --tiny_patch_size 8".split()


@pytest.fixture
def pets(tmp_path) -> Path:
    """A sound data set `pets` of 12 pictures with two captions each and dense texts."""
    folder = tmp_path / "data" / "pets"
    names = picture_folder(folder / "images", 12)
    mapping, first = {}, 0
    for split, size in SIZES.items():
        mine = names[first : first + size]
        first += size
        ids = [name[:-4] for name in mine]
        mapping |= dict(zip(ids, mine, strict=True))
        write(folder / f"{split}_caps.txt", [text for name in mine for text in captions_of(name)])
        write(folder / f"{split}_ids.txt", [one for one in ids for _ in range(2)])
        dense = [{"image_id": one, "text": f"a long text of {one}"} for one in ids]
        write(folder / f"pets_{split}.jsonl", map(json.dumps, dense))
    (folder / "id_mapping.json").write_text(json.dumps(mapping))
    return folder


def write(path: Path, lines) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


def check(folder: Path, *flags: str) -> int:
    where = ["--dataset", "pets", "--data_path", str(folder.parent)]
    return check_data.main([*where, *TINY, "--workers", "1", *flags])


def found(folder: Path, capsys, *flags: str) -> dict:
    check(folder, "--json", *flags)
    return json.loads(capsys.readouterr().out)


def test_a_sound_data_set_on_one_screen(pets, capsys):
    assert check(pets) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["pets", "train", "dev", "test"]
    assert lines[2].split() == ["images", "8", "2", "2"]
    assert lines[3].split() == ["captions", "16", "4", "4"]
    assert "no image is in two splits" in lines
    assert lines[-1] == "training would not stop on this data"


def test_repeats_quotes_and_lengths_are_counted(pets, capsys):
    captions = read(pets / "train_caps.txt")
    captions[1] = captions[0].upper()  # the same words for the same image
    captions[3] = captions[4]  # of the next image
    captions[5] = "one two three " * 40
    write(pets / "train_caps.txt", captions)
    dense = [json.loads(line) for line in read(pets / "pets_train.jsonl")]
    dense[7]["text"] = dense[6]["text"] = f"He said: {captions[14]}! And left."
    dense[5]["text"] = "caption"
    write(pets / "pets_train.jsonl", map(json.dumps, dense))
    report = found(pets, capsys, "--max_word", "30", "--max_dense_word", "4")
    train_report = report["splits"]["train"]
    assert train_report["repeated_within"] == 1
    assert train_report["repeated_across"] == 2
    assert train_report["caption_lengths"]["longest"] == 122
    assert train_report["caption_lengths"]["cut"] == pytest.approx(100 / 16)
    assert train_report["dense_repeated"] == 1
    assert train_report["dense_quotes"] == ["p07"]
    assert train_report["dense_lengths"]["cut"] == pytest.approx(100 * 7 / 8)
    assert report["stops"] == []


def test_images_in_two_splits_are_found_by_bytes_file_and_id(pets, capsys):
    (pets / "images" / "p08.jpg").write_bytes(jpeg(2))  # dev's first is train's third
    mapping = json.loads((pets / "id_mapping.json").read_text())
    mapping["p10"] = "p09.jpg"  # test's first is dev's second
    (pets / "id_mapping.json").write_text(json.dumps(mapping))
    write(pets / "test_ids.txt", ["p10", "p10", "p00", "p00"])
    (pets / "pets_test.jsonl").unlink()
    assert found(pets, capsys)["shared"] == {
        "train, dev": ["p02"],
        "train, test": ["p00"],
        "dev, test": ["p09"],
    }


def bad_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / "images" / name).write_bytes(b"\xff\xd8 no image")


FAULTS = {
    "sound": (lambda f: None, []),
    "bad test image": (lambda f: bad_images(f, "p11.jpg"), []),
    "one bad training image": (lambda f: bad_images(f, "p01.jpg"), []),
    "no dev": (lambda f: [(f / f"dev_{one}.txt").unlink() for one in ("caps", "ids")], []),
    "no dense texts of dev": (lambda f: (f / "pets_dev.jsonl").unlink(), []),
    "dense texts not needed": (
        lambda f: (f / "pets_train.jsonl").unlink(),
        ["--dense_side", "none"],
    ),
    "no dense texts": (lambda f: (f / "pets_train.jsonl").unlink(), []),
    "half the dense texts": (
        lambda f: write(f / "pets_train.jsonl", read(f / "pets_train.jsonl")[:4]),
        [],
    ),
    "dense texts of dev broken": (lambda f: (f / "pets_dev.jsonl").write_text("{\n"), []),
    "more bad images": (lambda f: bad_images(f, "p01.jpg"), ["--max_bad_images", "0"]),
    "bad dev image": (lambda f: bad_images(f, "p08.jpg"), []),
    "missing image": (lambda f: (f / "images" / "p03.jpg").unlink(), []),
    "id without file": (lambda f: (f / "id_mapping.json").write_text('{"p00": "p00.jpg"}'), []),
    "captions and ids disagree": (lambda f: write(f / "train_ids.txt", ["a", "b", "c"]), []),
    "no training captions": (lambda f: (f / "train_caps.txt").unlink(), []),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_says_stop_where_training_stops(pets, tmp_path, name, capsys):
    spoil, flags = FAULTS[name]
    spoil(pets)
    code = check(pets, *flags)
    printed = capsys.readouterr().out
    quick = "--num_epochs 1 --workers 0 --batch_size 4 --val_step 4 --log_step 1".split()
    where = ["--dataset", "pets", "--data_path", str(pets.parent)]
    run = ["--logger_name", str(tmp_path / "run")]
    stopped = train.main([*where, *TINY, *quick, *run, *flags]) != 0
    assert code == int(stopped)
    assert ("training would stop:" in printed) == stopped
    assert max(map(len, printed.splitlines()[:20])) <= 80


def test_what_would_stop_evaluation_alone_is_a_note(pets, capsys):
    bad_images(pets, "p11.jpg")
    report = found(pets, capsys)
    assert report["stops"] == []
    assert any("evaluation would stop: test: 1 images do not decode" in n for n in report["notes"])


def test_json_into_a_file_and_images_elsewhere(pets, tmp_path, capsys):
    shutil.move(pets / "images", tmp_path / "elsewhere")
    assert check(pets) == 1
    flags = ["--image_path", str(tmp_path / "elsewhere"), "--json", str(tmp_path / "r.json")]
    assert check(pets, *flags) == 0
    assert "training would not stop" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["splits"]["dev"]["images"] == 2


def test_an_unknown_data_set_is_one_sentence(tmp_path, capsys):
    assert check_data.main(["--dataset", "nowhere", "--data_path", str(tmp_path)]) == 2
    assert "--dataset nowhere: no folder" in capsys.readouterr().err
