"""Where the named things lie, on hand-made facts; siblings side by side in the order of pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lib.data.loaders import PairSampler
from lib.data.scenes.facts import named_coverage, sibling_captions
from lib.data.scenes.generate import generate_scenes
from lib.data.splits import Split, load_split
from lib.errors import InputError


def two_images(root, image_size=8):
    """Two siblings of 8 pixels with two captions each, and their split."""
    things = [{"box": [0, 0, 4, 4]}, {"box": [3, 3, 7, 5]}, {"box": [6, 6, 8, 8]}]
    named = [[0, 2], [0, 1]]
    images = [
        {"image_id": one, "sibling_id": 1 - one, "things": things, "named": named} for one in (0, 1)
    ]
    (root / "scenes_facts.jsonl").write_text("\n".join(map(json.dumps, images)) + "\n")
    (root / "scenes.json").write_text(json.dumps({"image_size": image_size}))
    captions = ["a", "b", "c", "d"]
    return Split("scenes", "test", captions, ["0", "1"], [], np.array([0, 0, 1, 1]))


def test_coverage_by_hand(tmp_path):
    split = two_images(tmp_path)
    coverage = named_coverage(tmp_path, split, (2, 2))
    whole = np.array([16, 0, 0, 4]) / 20  # boxes 0 and 2
    # boxes 0 and 1, 16 + 8 pixels; the common pixel (3, 3) counts once
    overlapping = np.array([16, 3, 1, 3]) / 23
    np.testing.assert_allclose(coverage, [whole, overlapping, whole, overlapping])


def test_a_pixel_on_a_border_is_shared_out(tmp_path):
    coverage = named_coverage(tmp_path, two_images(tmp_path), (3, 5))
    np.testing.assert_allclose(coverage.sum(1), 1)
    rows = coverage[0].reshape(3, 5).sum(1)
    # 8 / 3 pixels a row of patches: box 0 (rows 0-3) and box 2 (rows 6-7)
    np.testing.assert_allclose(rows * 20, [4 * 8 / 3, 4 * 4 / 3, 4])


def test_siblings_name_each_other(tmp_path):
    split = two_images(tmp_path)
    assert sibling_captions(tmp_path, split).tolist() == [2, 3, 0, 1]
    alone = Split("scenes", "dev", ["a", "b"], ["0"], [], np.array([0, 0]))
    assert sibling_captions(tmp_path, alone).tolist() == [-1, -1]


def test_siblings_of_a_drawn_data_set(tmp_path):
    generate_scenes(tmp_path / "scenes", sizes=(8, 2, 2), image_size=64)
    split = load_split(tmp_path, "scenes", "train")
    siblings = sibling_captions(tmp_path / "scenes", split)
    assert (siblings[siblings] == np.arange(40)).all()
    assert (split.caption_image[siblings] == split.caption_image ^ 1).all()


@pytest.mark.parametrize("text", ["", "{", '{"image_id": 1', '["a"]'])
def test_unreadable_facts_are_told(tmp_path, text):
    split = two_images(tmp_path)
    (tmp_path / "scenes_facts.jsonl").write_text(text)
    with pytest.raises((InputError, KeyError)) as told:
        sibling_captions(tmp_path, split)
    assert told.type is InputError
    assert "scenes_facts.jsonl" in str(told.value)


def order_of(**settings):
    sampler = PairSampler(400, 20, seed=3, siblings=np.arange(400) ^ 1, **settings)
    return [index for batch in sampler for _, index in batch]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_share_of_the_pairs_lies_beside_its_sibling(share):
    order = order_of(sibling_share=share)
    assert sorted(order) == list(range(400))
    place = {index: position for position, index in enumerate(order)}
    beside = np.mean([abs(place[one] - place[one ^ 1]) == 1 for one in range(400)])
    assert beside == pytest.approx(share, abs=0.1)


def test_no_share_leaves_the_order_alone():
    plain = [index for batch in PairSampler(400, 20, seed=3) for _, index in batch]
    assert order_of(sibling_share=0.0) == plain
