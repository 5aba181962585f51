"""Compaction of an index: the same pictures afterwards, also where it is killed on the way."""

from __future__ import annotations

import fcntl
import os
import random

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.retrieval import compaction
from lib.retrieval.compaction import compact, dead_share
from lib.retrieval.index import Part, Picture, PictureIndex
from lib.retrieval.records import pack, unpack

MANIFEST = {"folder": "/nowhere", "dimension": 2, "store": "float16"}


class Killed(BaseException):
    """Stands for a signal that no handler sees."""


def add(index: PictureIndex, version: int, names: list[str], gone: list[str] = ()) -> None:
    """Add a shard in which each picture's numbers are those of its version."""
    count = len(names)
    pictures = [Picture(name, version) for name in names]
    pictures += [Picture(name, gone=True) for name in gone]
    values = torch.full((count, 3, 4), float(version))
    records = pack({"patches": values}, "float16", 4) if count else np.empty(0)
    dense = [f"{name} {version}\u2028" for name in names]
    index.add_shard(Part(), pictures, np.full((count, 2), version), records, dense or None)
    index.refresh()


def content(index: PictureIndex) -> dict[str, tuple[int, float, float]]:
    """What each picture's entry, vector and record say; its dense text says the same."""
    texts = index.dense_texts(np.arange(len(index)))
    assert texts == [f"{picture.path} {picture.size}\u2028" for picture in index.pictures]
    records = unpack(index.records(np.arange(len(index))))["patches"]
    return {
        picture.path: (picture.size, float(index.vectors[row, 0]), float(records[row, 0, 0]))
        for row, picture in enumerate(index.pictures)
    }


def made(folder) -> PictureIndex:
    """Five pictures, two changed since, one of them twice, one deleted and another come back."""
    index = PictureIndex.create(folder, MANIFEST)
    add(index, 1, ["a", "b", "c", "d", "e"])
    add(index, 2, ["a", "b"], gone=["c", "d"])
    add(index, 3, ["f", "g"])  # nothing of it is superseded
    add(index, 4, ["b", "d"])
    return index


WANTED = {name: (n, n, n) for name, n in {"a": 2, "b": 4, "d": 4, "e": 1, "f": 3, "g": 3}.items()}


def test_the_same_pictures_in_less_room(tmp_path):
    index = made(tmp_path / "index")
    assert content(index) == WANTED
    assert dead_share(index) == pytest.approx(5 / 11)
    assert index.shards[2] not in index.superseded_shards()
    assert compact(index) == 5
    assert content(index) == WANTED
    assert content(PictureIndex.open(index.folder)) == WANTED
    assert dead_share(index) == 0
    assert len(index.shards) == 3  # the one that was whole, the last one, and a new one
    assert compact(index, 0) == 0


def test_a_small_share_stays_unless_asked(tmp_path):
    index = PictureIndex.create(tmp_path / "index", MANIFEST)
    add(index, 1, list("abcdefgh"))
    add(index, 2, ["a"])
    assert compact(index) == 0
    assert index.rows_on_disk == 9
    assert compact(index, 0) == 1
    assert content(index) == {"a": (2, 2, 2), **{name: (1, 1, 1) for name in "bcdefgh"}}


def test_pictures_with_dense_texts_keep_them_beside_some_without(tmp_path):
    index = PictureIndex.create(tmp_path / "index", MANIFEST)
    add(index, 1, ["a", "b"])
    add(index, 2, ["c", "d"])
    (index.folder / "shards" / index.shards[0] / "dense.jsonl").unlink()  # of an earlier version
    add(index, 3, ["a", "c"])
    assert compact(index, 0) == 2
    texts = {p.path: index.dense_texts(np.array([n])) for n, p in enumerate(index.pictures)}
    kept = {"a": 3, "c": 3, "d": 2}
    assert texts == {"b": None, **{name: [f"{name} {kept[name]}\u2028"] for name in kept}}


def test_all_pictures_gone(tmp_path):
    index = PictureIndex.create(tmp_path / "index", MANIFEST)
    add(index, 1, ["a", "b"])
    add(index, 2, [], gone=["a", "b"])
    assert compact(index) == 2
    assert (len(index), index.shards) == (0, [])


def test_killed_at_any_step_it_holds_the_same_pictures(tmp_path, monkeypatch):
    replace, steps = os.replace, 0
    monkeypatch.setattr(compaction, "SHARD_PICTURES", 1)
    while True:
        index = made(tmp_path / f"index{steps}")
        left = steps

        def counted(source, target):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", counted)
        try:
            compact(index)
            break
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            again = PictureIndex.open(index.folder)
            assert content(again) == WANTED, steps
            compact(again, 0)
            assert content(again) == WANTED, steps
            assert dead_share(again) == 0
        steps += 1
    assert steps == 4  # two shards written, two removed


def test_it_waits_for_no_writer_and_no_writer_for_another(tmp_path):
    index = made(tmp_path / "index")
    with index.writing(Part(1, 2)), index.writing(Part(2, 2)):
        assert compact(index) is None
        assert index.rows_on_disk == 11
    assert compact(index) == 5
    with open(index.writers_lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing holds it any more


def test_a_reader_that_was_open_is_told_to_open_again(tmp_path):
    index = made(tmp_path / "index")
    reader = PictureIndex.open(index.folder)
    compact(index)
    with pytest.raises(InputError, match="open it again"):
        reader.records(np.arange(len(reader)))


def test_any_history_is_kept(tmp_path):
    rng = random.Random(0)
    index, wanted = PictureIndex.create(tmp_path / "index", MANIFEST), {}
    for version in range(1, 40):
        names = rng.sample("abcdefghij", rng.randint(1, 3))
        gone = rng.sample(sorted(wanted.keys() - set(names)), rng.randint(0, 1) * bool(wanted))
        gone = [name for name in gone if name in wanted]
        add(index, version, names, gone)
        wanted = {k: v for k, v in wanted.items() if k not in gone}
        wanted.update({name: (version,) * 3 for name in names})
        if rng.random() < 0.3:
            compact(index, rng.choice([0.0, 0.5]))
        assert content(index) == wanted
    assert len(index.shards) < 39
