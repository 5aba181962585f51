"""Drawn splits keep groups together and near their shares; near-duplicates are found exactly."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest

from lib.data.prepare.duplicates import hash_images, near_groups
from lib.data.prepare.photos import Photo
from lib.data.prepare.splitting import draw_splits, parse_plan, split_by_lists
from lib.errors import InputError
from tests.data.prepare.pictures import picture_folder, pixels


def test_splits_are_drawn_by_group_near_their_shares_and_repeat():
    groups = [number // 3 for number in range(300)]
    splits = draw_splits(groups, (0.8, 0.1, 0.1), seed=3)
    assert Counter(splits) == {"train": 240, "dev": 30, "test": 30}
    assert all(len({splits[3 * g + k] for k in range(3)}) == 1 for g in range(100))
    assert splits == draw_splits(groups, (0.8, 0.1, 0.1), seed=3)
    assert splits != draw_splits(groups, (0.8, 0.1, 0.1), seed=4)


def test_a_large_group_goes_where_there_is_room():
    splits = draw_splits([0] * 50 + list(range(1, 51)), (0.6, 0.2, 0.2), seed=0)
    assert Counter(splits) == {"train": 60, "dev": 20, "test": 20}
    with pytest.raises(InputError, match="too few to give dev its share"):
        draw_splits([0] * 50, (0.8, 0.1, 0.1), seed=0)
    assert set(draw_splits([0, 1], (1.0, 0.0, 0.0), seed=0)) == {"train"}


@pytest.mark.parametrize("text", ["0.8/0.1", "0.8/0.1/0.2", "a/b/c", "0/0.5/0.5", "1.2/-0.1/-0.1"])
def test_shares_that_do_not_add_up_are_refused(text):
    with pytest.raises(InputError, match="add up to 1"):
        parse_plan(text)


def test_listed_splits(tmp_path):
    lists = [tmp_path / f"{one}.txt" for one in "abc"]
    for path, names in zip(lists, ("p0.jpg\np1.jpg\n", "p2\n", "sub/p3.jpg\n"), strict=True):
        path.write_text(names)
    photos = [Photo(f"p{n}.jpg") for n in range(5)]
    notes = split_by_lists(photos, parse_plan(",".join(map(str, lists))).lists)
    assert [one.split for one in photos] == ["train", "train", "dev", "test", None]
    assert notes == ["1 images are in none of the three lists and are left out"]
    lists[2].write_text("p0.jpg\n")
    with pytest.raises(InputError, match=r"c.txt:1: p0.jpg is listed in train already"):
        split_by_lists(photos, lists)


def test_groups_are_those_of_comparing_every_pair():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    values = [int(one) for one in base]
    for one in base[:30]:  # near ones at every distance from 0 to 9
        for distance in range(10):
            bits = rng.choice(64, distance, replace=False)
            values.append(int(one) ^ sum(1 << int(bit) for bit in bits))
    values += [None, None]
    for most in (0, 4, 6):
        groups = near_groups(values, most)
        expected = naive_groups(values, most)
        assert len({*zip(groups, expected, strict=True)}) == len({*groups}) == len({*expected})


def naive_groups(values, most) -> list[int]:
    groups = list(range(len(values)))
    for i, first in enumerate(values):
        for j, second in enumerate(values[:i]):
            if None not in (first, second) and bin(first ^ second).count("1") <= most:
                old, new = groups[i], groups[j]
                groups = [new if one == old else one for one in groups]
    return groups


def test_the_same_picture_saved_otherwise_is_near_and_others_are_not(tmp_path):
    pytest.importorskip("imagehash")
    names = picture_folder(tmp_path, 12)
    cv2.imwrite(str(tmp_path / "again.png"), cv2.resize(pixels(3), (200, 150)))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    everything = [*names, "again.png", "bad.jpg"]
    hashes = hash_images(tmp_path, everything, tmp_path / "journal")
    assert hashes["bad.jpg"] is None
    groups = near_groups([hashes[name] for name in everything], 6)
    assert groups[3] == groups[12]
    assert len(set(groups)) == 13


def test_hashes_go_on_behind_a_cut_off_journal(tmp_path, monkeypatch):
    pytest.importorskip("imagehash")
    names = picture_folder(tmp_path, 6)
    journal = tmp_path / "journal"
    whole = hash_images(tmp_path, names, journal)
    text = journal.read_text()
    journal.write_text(text[: text.index("\n", 40) + 9])
    asked = []
    from lib.data.prepare import duplicates

    true_hash = duplicates._hash
    monkeypatch.setattr(duplicates, "_hash", lambda path: asked.append(path) or true_hash(path))
    assert hash_images(tmp_path, names, journal) == whole
    assert 0 < len(asked) < 6
    assert len(journal.read_text().splitlines()) == 6
