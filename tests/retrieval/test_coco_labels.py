"""CxC and ECCV Caption: the package's own numbers on matrices whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.retrieval import coco_labels
from lib.retrieval.coco_labels import (
    best_first,
    check_order,
    cxc_metrics,
    eccv_metrics,
    load_labels,
    ranked_items,
)
from lib.retrieval.metrics import fold_metrics, recall_metrics

pytest.importorskip("eccv_caption")
COCO = Path(__file__).parents[3] / "shared" / "captions" / "coco"
IMAGES, K = 20, 5


@pytest.fixture(scope="module")
def labels():
    return load_labels()


@pytest.fixture
def small(monkeypatch):
    """The package over 20 images of its own: ids 7, 14, … and captions 1000, 1001, …"""
    labels = load_labels()
    images = [7 * (row + 1) for row in range(IMAGES)]
    captions = [1000 + index for index in range(IMAGES * K)]
    owner = {caption: images[index // K] for index, caption in enumerate(captions)}
    own = {image: [c for c in captions if owner[c] == image] for image in images}
    labels.coco_ids = np.array(captions)
    labels.coco_gts = {"i2t": own, "t2i": {c: [image] for c, image in owner.items()}}
    # caption 1005, of image 14, also fits image 7; caption 1099 has no label at all
    more_i2t = {image: list(found) for image, found in own.items()}
    more_i2t[7].append(1005)
    more_t2i = {c: [image] for c, image in owner.items()}
    more_t2i[1005].append(7)
    del more_t2i[1099]
    labels.cxc_gts = {"i2t": more_i2t, "t2i": more_t2i}
    labels.eccv_gts = {"i2t": {7: more_i2t[7]}, "t2i": {1005: more_t2i[1005], 1000: [7]}}
    monkeypatch.setattr(coco_labels, "load_labels", lambda: labels)
    return labels, [str(one) for one in images], np.repeat(np.arange(IMAGES), K)


def gallery(seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((IMAGES, IMAGES * K)).astype(np.float32)
    matrix[np.repeat(np.arange(IMAGES), K), np.arange(IMAGES * K)] += signal
    return matrix


def test_recalls_by_hand(small):
    _, ids, owners = small
    matrix = np.zeros((IMAGES, IMAGES * K), np.float32)
    matrix[owners, np.arange(IMAGES * K)] = 1.0
    matrix[0, 5] = 2.0  # image 7 prefers caption 1005, and caption 1005 image 7
    plain = recall_metrics(matrix)
    assert plain["i2t"]["r1"] == 95.0
    assert plain["t2i"]["r1"] == 99.0
    found = cxc_metrics(matrix, ids, owners)
    assert found["i2t"] == {"r1": 100.0, "r5": 100.0, "r10": 100.0}
    assert found["t2i"] == {"r1": 100.0, "r5": 100.0, "r10": 100.0}
    assert found["rsum"] == 600.0
    assert eccv_metrics(matrix, ids, owners)["i2t"] == {
        "map_at_r": pytest.approx(100.0),
        "r_precision": pytest.approx(100.0),
        "r1": 100.0,
    }


def test_eccv_metrics_by_hand(small):
    _, ids, owners = small
    matrix = np.zeros((IMAGES, IMAGES * K), np.float32)
    # image 7 has six answers: ranked right, wrong, right, right, wrong, wrong
    order = [0, 50, 1, 2, 51, 52, 3, 4, 5]
    matrix[0, order] = np.arange(9, 0, -1)
    matrix[:, 5] = 0.0
    matrix[[1, 4, 0], 5] = [3.0, 2.0, 1.0]  # caption 1005: image 14 right, 35 wrong, then 7
    matrix[3, 0] = 20.0  # caption 1000: wrong first
    found = eccv_metrics(matrix, ids, owners)
    assert found["i2t"]["r_precision"] == pytest.approx(50.0)
    assert found["i2t"]["map_at_r"] == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 6)
    assert found["t2i"]["r1"] == pytest.approx(50.0)
    assert found["t2i"]["r_precision"] == pytest.approx((50.0 + 0.0) / 2)


def test_ties_count_against(small):
    _, ids, owners = small
    flat = np.zeros((IMAGES, IMAGES * K), np.float32)
    assert cxc_metrics(flat, ids, owners)["rsum"] == 0.0
    found = eccv_metrics(flat, ids, owners)
    assert all(value == 0.0 for way in found.values() for value in way.values())
    scores, right = np.array([1.0, 3.0, 3.0, 2.0, 3.0]), np.array([0, 1, 0, 0, 0], bool)
    assert set(best_first(scores, right, 2)) == {2, 4}
    assert best_first(scores, right, 5).tolist()[2:] == [1, 3, 0]


def test_the_labels_of_coco_give_our_own_recalls(small):
    labels, ids, owners = small
    matrix = gallery()
    items = ranked_items(labels, labels.coco_gts, matrix, ids, owners, 10)
    ours = recall_metrics(matrix)
    for k in (1, 5, 10):
        theirs = labels.coco_5k_recalls(items, "all", K=k)
        for way in ("i2t", "t2i"):
            assert 100 * theirs[way] == pytest.approx(ours[way][f"r{k}"])


def test_the_fault_of_coco_1k_and_our_way_round_it(small):
    """Lists of the best of the whole gallery leave folds empty; those of one's fold do not."""
    labels, ids, owners = small
    matrix = gallery(signal=0.0)
    short = ranked_items(labels, labels.coco_gts, matrix, ids, owners, 3)
    with pytest.raises(IndexError):
        labels.coco_1k_recalls(short, "all", K=1)
    folds = np.repeat(np.arange(5), IMAGES // 5)
    apart = np.where(folds[:, None] == folds[owners][None], matrix, -1e9)
    own = ranked_items(labels, labels.coco_gts, apart, ids, owners, IMAGES * K)
    ours = fold_metrics(matrix, 5)
    for k in (1, 5, 10):
        theirs = labels.coco_1k_recalls(own, "all", K=k)
        for way in ("i2t", "t2i"):
            assert 100 * theirs[way] == pytest.approx(ours[way][f"r{k}"])


@pytest.mark.parametrize("ids", [["a"] * IMAGES, [str(row) for row in range(IMAGES)]])
def test_other_ids_are_an_error(small, ids):
    labels, _, owners = small
    with pytest.raises(InputError, match=r"caption 1 belongs to image \w+, .* to 7: .*testall_ids"):
        check_order(labels, ids, owners)


def test_another_order_is_an_error(small):
    labels, ids, owners = small
    swapped = [*ids[:4], ids[5], ids[4], *ids[6:]]
    with pytest.raises(InputError, match=r"caption 21 belongs to image 42, .* to 35"):
        check_order(labels, swapped, owners)
    with pytest.raises(InputError, match="of 100 captions, not for 99"):
        check_order(labels, ids, owners[:-1])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="pip install eccv_caption"):
        load_labels()


# --- the real labels ----------------------------------------------------------------------------


def read_testall():
    if not COCO.exists():
        pytest.skip(f"no {COCO}")
    lines = (COCO / "testall_ids.txt").read_text().split()
    captions = (COCO / "testall_caps.txt").read_text().splitlines()
    ids = list(dict.fromkeys(lines))
    row = {one: index for index, one in enumerate(ids)}
    return ids, np.array([row[one] for one in lines]), captions


def test_ids_and_order_are_those_of_testall(labels):
    ids, owners, captions = read_testall()
    caption_ids = check_order(labels, ids, owners)
    assert len(ids) == 5000
    assert (np.diff(caption_ids.reshape(5000, 5), axis=1) > 0).all()  # COCO's ascending ids
    # The caption that a label gives a further image has more words in common with that image's
    # captions than its four siblings have: the order within an image is right too.
    words = [set(text.lower().split()) for text in captions]
    place = {int(one): index for index, one in enumerate(caption_ids)}
    row = {int(one): index for index, one in enumerate(ids)}
    shares = []
    for caption, images in labels.eccv_gts["t2i"].items():
        first, within = divmod(place[caption], 5)
        for image in images:
            there = set().union(*words[5 * row[image] : 5 * row[image] + 5])
            turned = [words[5 * first + (within + turn) % 5] for turn in range(5)]
            if row[image] != first:
                shares.append([len(one & there) / len(one) for one in turned])
    own, *siblings = np.mean(shares, axis=0)
    assert len(shares) > 9000
    assert own > max(siblings) + 0.02  # with a standard error below 0.002


def test_fewer_depths_change_no_recall_of_the_field(small):
    _, ids, owners = small
    matrix = gallery(signal=0.5)
    assert cxc_metrics(matrix, ids, owners, (1,)) == cxc_metrics(matrix, ids, owners, (1, 5, 10))


@pytest.mark.slow
def test_the_whole_gallery_with_a_known_answer(labels):
    """Every labelled pair scores 1, all others 0: all found but what the gallery does not hold."""
    ids, owners, _ = read_testall()
    place = {int(one): index for index, one in enumerate(labels.coco_ids)}
    row = {int(one): index for index, one in enumerate(ids)}
    matrix = np.zeros((5000, 25000), np.float32)
    for image, found in labels.cxc_gts["i2t"].items():
        matrix[row[image], [place[one] for one in found]] = 1.0
    assert cxc_metrics(matrix, ids, owners, (1, 5, 10)) == {
        "i2t": {"r1": 100.0, "r5": 100.0, "r10": 100.0},
        "t2i": {"r1": 100.0, "r5": 100.0, "r10": 100.0},
        "rsum": 600.0,
    }
    matrix[:] = 0
    missing = []
    for image, found in labels.eccv_gts["i2t"].items():
        held = [place[one] for one in found if one in place]
        matrix[row[image], held] = 1.0
        missing.append(len(found) - len(held))
    assert sum(missing) == 2  # of 22,550: two captions of the labels are none of the gallery
    found = eccv_metrics(matrix, ids, owners)
    assert found["i2t"]["r1"] == 100.0
    assert 99.9 < found["i2t"]["r_precision"] < 100.0
