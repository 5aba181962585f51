"""Dense texts find their images by id, by number or by name, never by a wrong guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.data.dense_texts import read_dense
from lib.data.splits import ids_in, load_split, warn_of_shared_images
from lib.errors import InputError, InputWarning

IDS = ["7", "000012", "9"]


def written(tmp_path: Path, keys: list) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"image_id": key, "text": f"text of {key}"}) for key in keys]
    path.write_text("\n".join(lines) + "\n")
    return path


def texts(tmp_path, keys, ids=IDS):
    return read_dense(written(tmp_path, keys), ids, [f"{one}.jpg" for one in ids], "describe them")


@pytest.mark.parametrize(
    "keys", [["9", "7", "000012"], [9, 12, 7], ["0009", 12.0, "07"], ["9", "12", "7", "3"]]
)
def test_ids_match_as_written_or_as_numbers(tmp_path, keys):
    of = {int(float(key)): f"text of {key}" for key in keys}
    assert texts(tmp_path, keys) == [of[7], of[12], of[9]]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["7", "9", "a12"], r"no dense text for 1 of 3 images \(image ids 000012\)"),
        (["7", "9", "12", "012"], "image_id 12 and 012 are one number"),
        (["7", "9", None], "jsonl:3: image_id None is neither"),
        (["7", "9", True], "jsonl:3: image_id True is neither"),
        (["7", "9", 12.5], "jsonl:3: image_id 12.5 is neither"),
        (["7", "9", "٣"], "no dense text for 1 of 3"),
    ],
)
def test_others_are_refused_by_name(tmp_path, keys, told):
    with pytest.raises(InputError, match=told):
        texts(tmp_path, keys)


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "f30k"
    (tmp_path / "flickr30k-images").mkdir()
    folder.mkdir()
    for name in ("a", "b"):
        (tmp_path / "flickr30k-images" / f"{name}.jpg").write_bytes(b"jpg")
    (folder / "id_mapping.json").write_text(json.dumps({"1": "a.jpg", "2": "a.jpg", "3": "b.jpg"}))
    for split, ids in (("train", "1\n2\n3\n"), ("dev", "3\n")):
        (folder / f"{split}_ids.txt").write_text(ids)
        (folder / f"{split}_caps.txt").write_text("a caption\n" * len(ids.split()))
    return tmp_path


def test_ids_that_share_a_file_are_warned_of(root):
    with pytest.warns(InputWarning, match="2 of 3 image ids share 1 files .*a.jpg"):
        load_split(root, "f30k", "train")


@pytest.mark.filterwarnings("ignore::lib.errors.InputWarning")
def test_splits_that_share_images_are_warned_of(root, recwarn):
    train, dev = load_split(root, "f30k", "train"), load_split(root, "f30k", "dev")
    with pytest.warns(InputWarning, match=r"1 of 1 images of dev are in train too \(image ids 3\)"):
        warn_of_shared_images(dev, ids_in(root, "f30k", "train"), train.name)
    warn_of_shared_images(dev, ids_in(root, "f30k", "test"), "test")  # no such file: no warning
    assert ids_in(root, "f30k", "test") == []
