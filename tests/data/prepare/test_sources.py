"""Each source's own format: caption files, Karpathy's JSON, shards, Hugging Face tables."""

from __future__ import annotations

import json

import pytest

from lib.data.prepare.captions import Columns, read_captions
from lib.data.prepare.extract import Journal, safe_name
from lib.data.prepare.folder import read_folder
from lib.data.prepare.hub import extract_hub
from lib.data.prepare.karpathy import dataset_name, read_karpathy
from lib.data.prepare.shards import extract_shards
from lib.data.tars import expand_shards, read_samples
from lib.errors import InputError
from tests.data.prepare.pictures import (
    caption_csv,
    jpeg,
    karpathy_json,
    picture_folder,
    write_shard,
)

GUESS = Columns()


def rows_of(path, text: str, wanted: Columns = GUESS):
    path.write_text(text, encoding="utf-8")
    rows, notes = read_captions(path, wanted)
    return [(row.image, *row.captions) for row in rows], notes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kaggle.csv", 'image,caption\na.jpg,"One, two ."\nb.jpg,Three\n'),
        ("unquoted.csv", "image,caption\na.jpg,One, two .\nb.jpg,Three\n"),
        (
            "results.csv",
            "image_name| comment_number| comment\na.jpg| 0| One, two .\nb.jpg| 1| Three",
        ),
        ("order.csv", 'Caption,File Name\n"One, two .",a.jpg\nThree,b.jpg\n'),
        ("captions.txt", 'image,caption\na.jpg,"One, two ."\nb.jpg,Three\n'),
        ("token.txt", "a.jpg#0\tOne, two .\nb.jpg#0\tThree\n"),
        ("t.tsv", "image\tcaption\na.jpg\tOne, two .\nb.jpg\tThree\n"),
        ("bare.csv", "a.jpg,One, two .\nb.jpg,Three\n"),
        ("l.jsonl", '{"file_name": "a.jpg", "text": "One, two ."}\n\n'
         '{"file_name": "b.jpg", "text": "Three"}\n'),
    ],
)  # fmt: skip
def test_caption_files_of_every_kind_say_the_same(tmp_path, name, text):
    rows, notes = rows_of(tmp_path / name, text)
    assert rows == [("a.jpg", "One, two ."), ("b.jpg", "Three")]
    assert name in notes[0]


def test_columns_are_guessed_said_and_can_be_named(tmp_path):
    text = "id,photo,title,alt,split\n1,a.jpg,T,A,val\n"
    rows, notes = rows_of(tmp_path / "a.csv", text)
    assert rows == [("a.jpg", "T")]
    assert "image is column 'photo', caption 'title', split 'split'" in notes[0]
    assert rows_of(tmp_path / "a.csv", text, Columns(caption="ALT"))[0] == [("a.jpg", "A")]
    with pytest.raises(InputError, match=r"no column nothing \(--caption_column\), there are id,"):
        rows_of(tmp_path / "a.csv", text, Columns(caption="nothing"))
    with pytest.raises(InputError, match="which of the columns a, b holds the image"):
        rows_of(tmp_path / "b.csv", "a,b\n1,2\n")


def test_lists_of_captions_and_quotes_in_tsv(tmp_path):
    rows, _ = rows_of(tmp_path / "a.jsonl", '{"image": "a.jpg", "captions": ["x", "y"]}\n')
    assert rows == [("a.jpg", "x", "y")]
    text = 'image\tcaption\na.jpg\ta " First " outfit\nb.jpg\t"a ""big"" one"\n'
    assert rows_of(tmp_path / "a.tsv", text)[0] == [
        ("a.jpg", 'a " First " outfit'),
        ("b.jpg", 'a "big" one'),
    ]


def test_a_rare_broken_row_is_told_and_many_are_refused(tmp_path):
    good = "".join(f"p{n}.jpg| 0| text\n" for n in range(200))
    head = "image_name| comment_number| comment\n"
    rows, notes = rows_of(tmp_path / "a.csv", head + good + "p1.jpg| 4   A dog runs\n")
    assert len(rows) == 200
    assert "1 of 201 rows lack" in notes[1]
    assert "line 202" in notes[1]
    with pytest.raises(InputError, match=r"a.csv:202: 5 of 205 rows lack"):
        rows_of(tmp_path / "a.csv", head + good + "p1.jpg| 4   A dog\n" * 5)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.doc", "x", "give a file that ends in .csv"),
        ("a.csv", "\n", "a.csv is empty"),
        ("a.jsonl", '{"image": "a", "text": "b"}\n{"image":', "a.jsonl:2: not a JSON line"),
        ("a.txt", "a.jpg#0\tx\nnonsense\n", "a.txt:2: not of the form"),
    ],
)
def test_unreadable_caption_files_are_refused(tmp_path, name, text, told):
    with pytest.raises(InputError, match=told):
        rows_of(tmp_path / name, text)


def test_folder_matches_by_path_name_or_stem_and_tells_what_is_left(tmp_path):
    picture_folder(tmp_path / "pics" / "sub", 3)
    picture_folder(tmp_path / "pics", 1)
    text = "image,caption\nsub/p00.jpg,A\np01,B\np01.jpg,B2\nnowhere.jpg,C\n"
    (tmp_path / "a.csv").write_text(text)
    source = read_folder(tmp_path / "pics", tmp_path / "a.csv", GUESS)
    assert {one.name: one.captions for one in source.photos} == {
        "sub/p00.jpg": ["A"],
        "sub/p01.jpg": ["B", "B2"],
    }
    assert any("1 images of the caption file are not in the folder" in n for n in source.notes)
    assert any("2 images have no caption" in note for note in source.notes)


def test_karpathy_gives_the_fields_splits_ids_and_captions(tmp_path):
    path = karpathy_json(tmp_path / "dataset_coco.json", "coco", each=7)
    assert dataset_name(path) == "coco"
    source = read_karpathy(path, check_counts=False)
    assert [one.split for one in source.photos] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    assert source.photos[0].image_id == "1000"
    assert source.photos[0].name == "val2014/p00.jpg"
    assert source.photos[3].captions == [f"text {k} of 3" for k in range(5)]
    assert "10 images have more than 5 captions" in source.notes[1]
    with pytest.raises(InputError, match=r"6/2/2 images .* coco is known to have 113287/5000/5000"):
        read_karpathy(path)


def test_karpathys_known_counts_are_accepted(tmp_path):
    path = karpathy_json(tmp_path / "a.json", "flickr30k", counts=(29000, 1014, 1000), each=1)
    assert len(read_karpathy(path).photos) == 31014


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON, or cut off"),
        ("[]", 'no list "images"'),
        ('{"dataset": "x", "images": []}', "\"dataset\" is 'x'"),
        ('{"dataset": "coco", "images": [{"filename": "a"}]}', "image 0 lacks 'sentences'"),
    ],
)
def test_other_json_is_refused(tmp_path, text, told):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=told):
        read_karpathy(tmp_path / "a.json", check_counts=False)


def test_shards_give_lines_or_json_and_keep_the_bytes(tmp_path):
    pytest.importorskip("webdataset")

    def entries(key):
        told = {"captions": [f"j {key}", "second"], "split": "val"}
        return {"jpg": jpeg(key), "json": json.dumps(told).encode()}

    write_shard(tmp_path / "s-0.tar", [1, 2], lambda key: {"jpg": jpeg(key), "txt": b"a\nb\n"})
    write_shard(tmp_path / "s-1.tar", [1], entries)
    seen = []
    journal = Journal(tmp_path / "journal")
    source = extract_shards(str(tmp_path / "s-{0..1}.tar"), tmp_path / "i", journal, seen.append)
    assert [(one.name, one.captions, one.split) for one in source.photos] == [
        ("s-0/00001.jpg", ["a", "b"], None),
        ("s-0/00002.jpg", ["a", "b"], None),
        ("s-1/00001.jpg", ["j 1", "second"], "dev"),
    ]
    assert (tmp_path / "i" / "s-0" / "00002.jpg").read_bytes() == jpeg(2)
    assert sum(seen) == 3


def test_shards_that_are_missing_or_damaged_are_named(tmp_path):
    pytest.importorskip("webdataset")
    path = write_shard(tmp_path / "s-0.tar", [1, 2])
    with pytest.raises(InputError, match=r"1 of 2 shards .* \(.*s-1.tar first\)"):
        expand_shards(str(tmp_path / "s-{0..1}.tar"))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"s-0.tar"):
        list(read_samples(str(path)))
    write_shard(path, [1], lambda key: {"txt": b"alone"})
    with pytest.raises(InputError, match="sample 00001 has no image, only txt"):
        extract_shards(str(path), tmp_path, Journal(tmp_path / "journal"), lambda done: None)


@pytest.mark.parametrize(
    ("key", "name"),
    [("a/../../b", "a/b.jpg"), ("/etc/x", "etc/x.jpg"), ("c d?.jpg", "c_d_.jpg"), ("..", None)],
)
def test_names_from_foreign_files_stay_in_the_image_folder(key, name):
    if name is None:
        with pytest.raises(InputError):
            safe_name(key, jpeg(0), "here")
    else:
        assert safe_name(key, jpeg(0), "here") == name


def hub_rows():
    return [(jpeg(n // 2), f"caption {n}") for n in range(6)]  # an image with two rows


def test_hugging_face_tables_from_disk_and_imagefolder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": data, "path": None} for data, _ in hub_rows()],
            "caption": [text for _, text in hub_rows()],
        },
        features=datasets.Features(image=datasets.Image(), caption=datasets.Value("string")),
    )
    table.save_to_disk(str(tmp_path / "saved"))
    source = hub_source(tmp_path, "saved")
    assert [one.captions for one in source.photos] == [
        [f"caption {2 * n}", f"caption {2 * n + 1}"] for n in range(3)
    ]
    assert (tmp_path / "saved_images" / source.photos[1].name).read_bytes() == jpeg(1)
    names = picture_folder(tmp_path / "folder" / "train", 3)
    picture_folder(tmp_path / "folder" / "validation", 2)
    for split, count in (("train", 3), ("validation", 2)):
        lines = [json.dumps({"file_name": n, "text": f"about {n}"}) for n in names[:count]]
        (tmp_path / "folder" / split / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"p00.jpg is in two splits, train and dev"):
        hub_source(tmp_path, "folder")  # both splits call their images alike
    for path in (tmp_path / "folder" / "validation").glob("*.jpg"):
        path.rename(path.with_name(f"v{path.name}"))
    meta = tmp_path / "folder" / "validation" / "metadata.jsonl"
    meta.write_text(meta.read_text().replace('"file_name": "p', '"file_name": "vp'))
    (tmp_path / "folder_journal").unlink()
    source = hub_source(tmp_path, "folder")
    assert [(one.name, one.split) for one in source.photos] == [
        *[(name, "train") for name in names],
        ("vp00.jpg", "dev"),
        ("vp01.jpg", "dev"),
    ]


def hub_source(root, name):
    journal = Journal(root / f"{name}_journal")
    images = root / f"{name}_images"
    return extract_hub(str(root / name), None, GUESS, images, journal, lambda done: None)


def test_a_hub_name_out_of_reach_is_told(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"hf someone/photos: neither a local folder"):
        extract_hub(
            "someone/photos", None, GUESS, tmp_path, Journal(tmp_path / "j"), lambda done: None
        )


def test_csv_from_the_fixture_has_its_captions(tmp_path):
    names = picture_folder(tmp_path / "p", 2)
    rows, _ = read_captions(caption_csv(tmp_path / "a.csv", names), GUESS)
    assert [row.image for row in rows] == ["p00.jpg", "p00.jpg", "p01.jpg", "p01.jpg"]
