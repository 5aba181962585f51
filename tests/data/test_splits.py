"""Splits from small files: both forms of ids, dense texts, and every wrong input's sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from lib.data.splits import first_captions, first_images, load_split
from lib.errors import InputError

CAPTIONS = [f"caption number {n}" for n in range(6)]
NAMES = {"7": "seven.jpg", "3": "three.jpg", "9": "nine.jpg"}


def write_lines(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_dense(root: Path, records) -> Path:
    return write_lines(root / "f30k" / "f30k_train.jsonl", map(json.dumps, records))


def write_image(path: Path, shade: int, size: tuple[int, int] = (40, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 256, (*size, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.GaussianBlur(pixels, (0, 0), 3))


@pytest.fixture
def root(tmp_path) -> Path:
    """A data folder with a train split: three images, ids 7, 3, 9, two captions each."""
    folder = tmp_path / "f30k"
    write_lines(folder / "train_caps.txt", CAPTIONS)
    write_lines(folder / "train_ids.txt", ["7", "7", "3", "3", "9", "9"])
    (folder / "id_mapping.json").write_text(json.dumps(NAMES))
    for shade, name in enumerate(NAMES.values()):
        write_image(tmp_path / "flickr30k-images" / name, shade)
    return tmp_path


def test_ids_line_per_caption(root):
    split = load_split(root, "f30k", "train")
    assert split.captions == CAPTIONS
    assert split.image_ids == ["7", "3", "9"]
    assert split.caption_image.tolist() == [0, 0, 1, 1, 2, 2]
    assert [os.path.basename(file) for file in split.image_files] == list(NAMES.values())
    assert split.dense is None


def test_ids_line_per_caption_with_unequal_counts_out_of_order(root):
    write_lines(root / "f30k" / "train_ids.txt", ["9", "7", "9", "9", "7", "3"])
    split = load_split(root, "f30k", "train")
    assert split.image_ids == ["9", "7", "3"]
    assert split.caption_image.tolist() == [0, 1, 0, 0, 1, 2]


def test_ids_line_per_image(root):
    write_lines(root / "f30k" / "train_ids.txt", ["3", "9"])
    split = load_split(root, "f30k", "train")
    assert split.image_ids == ["3", "9"]
    assert split.caption_image.tolist() == [0, 0, 0, 1, 1, 1]


def test_captions_are_split_at_newlines_alone(root):
    text = "one\u2028still one\r\ntwo\x85still two\r\n" + "more\r\n" * 4
    (root / "f30k" / "train_caps.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    captions = load_split(root, "f30k", "train").captions
    assert captions == ["one\u2028still one", "two\x85still two", *["more"] * 4]


def test_coco_test_is_testall_and_images_lie_in_two_folders(tmp_path):
    write_lines(tmp_path / "coco" / "testall_caps.txt", CAPTIONS)
    write_lines(tmp_path / "coco" / "testall_ids.txt", ["1", "2"])
    mapping = {"1": "train2014/COCO_train2014_000000000001.jpg", "2": "val2014/b.jpg"}
    (tmp_path / "coco" / "id_mapping.json").write_text(json.dumps(mapping))
    for name in mapping.values():
        write_image(tmp_path / "elsewhere" / name, 0)
    split = load_split(tmp_path, "coco", "test", image_path=tmp_path / "elsewhere")
    assert split.name == "test"
    assert all(os.path.isfile(file) for file in split.image_files)


def test_without_pixels_neither_images_nor_mapping_are_needed(root):
    (root / "f30k" / "id_mapping.json").unlink()
    split = load_split(root, "f30k", "train", check_images=False)
    assert split.image_files == []
    assert split.image_ids == ["7", "3", "9"]


@pytest.mark.parametrize(
    "records",
    [
        [{"text": "seven"}, {"text": "three"}, {"text": "nine"}],
        [
            {"text": "nine", "image_id": 9},
            {"text": "other", "image_id": 8},
            {"text": "seven", "image_id": "7"},
            {"text": "three", "image_id": 3},
        ],
        [
            {"text": "three", "file_name": "three.jpg"},
            {"text": "nine", "file_name": "nine.jpg"},
            {"text": "seven", "file_name": "seven.jpg"},
        ],
    ],
    ids=["order", "image_id", "file_name"],
)
def test_dense_texts_are_matched(root, records):
    write_dense(root, records)
    assert load_split(root, "f30k", "train", needs_dense=True).dense == ["seven", "three", "nine"]
    assert load_split(root, "f30k", "train").dense is None


def test_dense_file_name_matches_a_mapping_with_folders(root):
    mapping = {one: f"sub/{name}" for one, name in NAMES.items()}
    (root / "f30k" / "id_mapping.json").write_text(json.dumps(mapping))
    records = [{"text": "a", "file_name": "sub/seven.jpg"}]
    records += [{"text": name, "file_name": name} for name in ("three.jpg", "nine.jpg")]
    write_dense(root, records)
    split = load_split(root, "f30k", "train", needs_dense=True, check_images=False)
    assert split.dense == ["a", "three.jpg", "nine.jpg"]


# --- wrong input: one sentence that names the place and the way out ----------------------------


def refuses(root: Path, *parts: str, dataset: str = "f30k", split: str = "train", **options):
    with pytest.raises(InputError) as caught:
        load_split(root, dataset, split, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_any_folder_is_a_data_set_and_its_images_lie_in_it(root):
    (root / "f30k").rename(root / "flowers")
    (root / "flickr30k-images").rename(root / "flowers" / "images")
    write_lines(
        root / "flowers" / "flowers_train.jsonl", [json.dumps({"text": t}) for t in ("a", "b", "c")]
    )
    split = load_split(root, "flowers", "train", needs_dense=True)
    assert split.dataset == "flowers"
    assert split.image_files[0] == str(root / "flowers" / "images" / "seven.jpg")
    assert split.dense == ["a", "b", "c"]
    (root / "flowers" / "images").rename(root / "elsewhere")
    refuses(root, "no image folder", "--image_path", dataset="flowers")
    assert load_split(root, "flowers", "train", image_path=root / "elsewhere").image_files


def test_refuses_an_unknown_dataset_with_those_there_are(root):
    refuses(root, "--dataset flowers", "which has f30k", "tools.prepare", dataset="flowers")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/sets/flowers/", "--data_path /sets --dataset flowers"),
        ("../flowers", "--data_path .. --dataset flowers"),
        ("..", "--dataset .."),
    ],
)
def test_refuses_a_path_for_a_dataset(root, name, told):
    refuses(root, told, dataset=name)


def test_refuses_missing_dataset_folder(root):
    refuses(root, f"no folder {root / 'coco'}", "--data_path", "LAPS", dataset="coco")
    refuses(root, f"no folder {root / 'scenes'}", "make demo", dataset="scenes")


@pytest.mark.parametrize("name", ["train_caps.txt", "train_ids.txt", "id_mapping.json"])
def test_refuses_missing_file(root, name):
    (root / "f30k" / name).unlink()
    refuses(root, f"no file {root / 'f30k' / name}", "github.com/CrossmodalGroup/LAPS")


def test_refuses_a_folder_in_a_files_place(root):
    (root / "f30k" / "train_caps.txt").unlink()
    (root / "f30k" / "train_caps.txt").mkdir()
    refuses(root, "train_caps.txt can't be read")


def test_refuses_missing_image_folder(root):
    refuses(root, "no image folder", "nowhere", "kaggle.com", image_path=root / "nowhere")


def test_coco_and_scenes_images_name_their_source(tmp_path):
    for dataset, source in (("coco", "images.cocodataset.org"), ("scenes", "make demo")):
        write_lines(tmp_path / dataset / "train_caps.txt", ["a"])
        write_lines(tmp_path / dataset / "train_ids.txt", ["1"])
        (tmp_path / dataset / "id_mapping.json").write_text('{"1": "1.jpg"}')
        refuses(tmp_path, "no image folder", source, dataset=dataset)


def test_refuses_missing_images_with_their_number_and_the_first_three(root):
    write_lines(root / "f30k" / "train_ids.txt", ["1", "2", "3", "4", "5", "6"])
    mapping = {str(n): f"{n}.jpg" for n in range(1, 7)} | {"3": "three.jpg"}
    (root / "f30k" / "id_mapping.json").write_text(json.dumps(mapping))
    first = ", ".join(str(root / "flickr30k-images" / f"{n}.jpg") for n in (1, 2, 4))
    refuses(root, "5 of 6 images are missing", f"({first}, …)", "--f30k_img_path")


def test_refuses_images_in_a_missing_subfolder(root):
    mapping = {one: f"sub/{name}" for one, name in NAMES.items()}
    (root / "f30k" / "id_mapping.json").write_text(json.dumps(mapping))
    refuses(root, "3 of 3 images are missing")


@pytest.mark.parametrize("count", [4, 7, 12])
def test_refuses_counts_that_disagree(root, count):
    write_lines(root / "f30k" / "train_ids.txt", range(count))
    refuses(root, "train_caps.txt has 6 captions", f"train_ids.txt has {count} ids")


def test_refuses_a_cut_off_list_of_one_id_per_caption(root):
    """3 ids divide 6 captions, yet the list can't be one id for each image."""
    write_lines(root / "f30k" / "train_ids.txt", ["7", "7", "3"])
    refuses(root, "train_ids.txt:2: id 7 repeats", "3 ids", "6 captions")


def test_refuses_empty_lines_and_files(root):
    write_lines(root / "f30k" / "train_caps.txt", [*CAPTIONS[:3], " \t", *CAPTIONS[4:]])
    refuses(root, "train_caps.txt:4: empty caption")
    write_lines(root / "f30k" / "train_caps.txt", CAPTIONS)
    write_lines(root / "f30k" / "train_ids.txt", ["7", ""])
    refuses(root, "train_ids.txt:2: empty image id")
    write_lines(root / "f30k" / "train_ids.txt", [])
    refuses(root, "train_ids.txt is empty")


def test_refuses_other_encodings_with_file_and_line(root):
    path = root / "f30k" / "train_caps.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\nfour\nfive\nsix\n")
    refuses(root, f"{path}:3: not UTF-8")


def test_refuses_broken_mappings(root):
    path = root / "f30k" / "id_mapping.json"
    path.write_text('{"7": "seven.jpg",\n"3": }')
    refuses(root, f"{path}:2: not JSON")
    path.write_text("[]")
    refuses(root, f"{path}: must map image ids to file names")
    path.write_text('{"7": "seven.jpg", "9": 4}')
    refuses(root, f"{path}: no file name for 2 of 3 image ids (3, 9)")


def test_refuses_a_split_without_dense_texts_where_they_are_needed(root):
    path = root / "f30k" / "f30k_train.jsonl"
    told = "tools.describe --dataset f30k --split train", "--val_split test", "--dense_side none"
    refuses(root, f"no {path}", *told, needs_dense=True)


@pytest.mark.parametrize(
    ("records", "parts"),
    [
        ([{"text": "a"}] * 2, ["has 2 dense texts", "3 images"]),
        ([{"text": "a"}] * 6, ["has 6 dense texts", "3 images"]),
        ([{"text": "a"}, {"caption": "b"}, {"text": "c"}], [":2: the line needs a non-empty"]),
        ([{"text": "a"}, {"text": " "}, {"text": "c"}], [":2: the line needs a non-empty"]),
        ([{"text": "a"}, ["b"], {"text": "c"}], [":2: the line needs a non-empty"]),
        ([{"text": "a", "image_id": 7}, {"text": "b"}], [':2: no "image_id"']),
        ([{"text": "a", "image_id": 7}, {"text": "b", "image_id": "7"}], [":2: image_id 7 has"]),
        ([{"text": "a", "image_id": 7}], ["no dense text for 2 of 3 images", "3, 9"]),
        ([{"text": "a", "file_name": "nine.jpg"}], ["no dense text for 2 of 3 images", "7, 3"]),
    ],
)
def test_refuses_dense_texts_that_do_not_fit(root, records, parts):
    write_dense(root, records)
    refuses(root, "f30k_train.jsonl", *parts, needs_dense=True)


def test_refuses_dense_lines_that_are_not_json(root):
    path = write_lines(root / "f30k" / "f30k_train.jsonl", ['{"text": "a"}', '{"text": "b', ""])
    refuses(root, f"{path}:2: not a JSON line", needs_dense=True)


def test_refuses_file_names_without_a_mapping(root):
    (root / "f30k" / "id_mapping.json").unlink()
    write_dense(root, [{"text": "a", "file_name": "seven.jpg"}])
    refuses(root, "no dense text for 3 of 3", needs_dense=True, check_images=False)


def test_the_first_captions_of_each_image_whatever_their_order(root):
    write_lines(root / "f30k" / "train_ids.txt", ["9", "7", "9", "9", "7", "3"])
    split = first_captions(load_split(root, "f30k", "train"), 2)
    assert split.captions == [CAPTIONS[n] for n in (0, 1, 2, 4, 5)]
    assert split.caption_image.tolist() == [0, 1, 0, 1, 2]
    assert split.image_ids == ["9", "7", "3"]
    assert first_captions(split, 0) is split


def test_the_first_images_of_a_split_with_their_captions(root):
    split = load_split(root, "f30k", "train")
    part = first_images(split, 2)
    assert part.captions == CAPTIONS[:4]
    assert part.image_ids == ["7", "3"]
    assert len(part.image_files) == 2
    assert first_images(split, 0) is split
    with pytest.raises(InputError, match="the train split has 3 images, fewer than the 4"):
        first_images(split, 4)
