"""The embedded data set: its files, its siblings, and whether its words are true of its pictures.

The texts are read back by a grammar of their own, written out here, not by the generator's tables.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import cv2
import numpy as np
import pytest

from lib.data.scenes import generate as scenes
from lib.data.scenes.clutter import draw_clutter
from lib.data.scenes.drawing import RGB, Thing, draw_scene, thing_box, visible_shares
from lib.data.scenes.generate import generate_scenes, invent_pair, scenes_ready

SIZES = (40, 8, 8)
SPLITS = ("train", "dev", "test")

SIZE_WORDS = {"small": "small", "little": "small", "big": "big", "large": "big"}
SHAPE_WORDS = {"circle": "circle", "ball": "circle", "square": "square", "box": "square"}
SHAPE_WORDS |= {name: name for name in ("triangle", "star", "cross", "ring", "heart")}
COLOUR_WORDS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
NAME = rf"an? (?:(small|little|big|large) )?({'|'.join(COLOUR_WORDS)}) ({'|'.join(SHAPE_WORDS)})"
PLACE = "top left|top middle|top right|middle left|middle right|middle|bottom left|bottom middle"
PLACE = f"{PLACE}|bottom right"
CAPTION = re.compile(
    rf"{NAME}(?: in the ({PLACE}))? (left of|right of|above|below|,) {NAME} and {NAME}"
)
FUNCTION_WORDS = {"a", "an", "the", "of", "in", "on", "and"}

DENSE_SIZE = {"tiny": "small", "huge": "big"}
DENSE_COLOUR = ("crimson", "emerald", "cobalt", "golden", "violet", "tangerine", "rose")
DENSE_COLOUR = dict(zip((*DENSE_COLOUR, "turquoise"), COLOUR_WORDS, strict=True))
DENSE_SHAPE = {"disc": "circle", "block": "square", "wedge": "triangle", "pentagram": "star"}
DENSE_SHAPE |= {"plus": "cross", "hoop": "ring", "valentine": "heart"}
DENSE_PLACE = ["northwest", "north", "northeast", "west", "centre", "east"]
DENSE_PLACE += ["southwest", "south", "southeast"]
DENSE_PLACE = {word: divmod(index, 3) for index, word in enumerate(DENSE_PLACE)}


def read_split(root, split):
    """Return (facts, five captions, dense text) of each image of a split."""
    facts = [json.loads(line) for line in (root / "scenes_facts.jsonl").open()]
    facts = [image for image in facts if image["split"] == split]
    captions = (root / f"{split}_caps.txt").read_text().splitlines()
    dense = [json.loads(line)["text"] for line in (root / f"scenes_{split}.jsonl").open()]
    fives = [captions[i : i + 5] for i in range(0, len(captions), 5)]
    return list(zip(facts, fives, dense, strict=True))


def holds(caption, facts):
    """Whether a caption is true of an image, by the facts."""
    match = CAPTION.fullmatch(caption)
    assert match, caption
    *name_1, place, relation = match.groups()[:5]
    name_2, name_3 = match.groups()[5:8], match.groups()[8:11]
    ones = [t for t in facts["things"] if is_named(t, *name_1) and is_at(t, place)]
    twos = [t for t in facts["things"] if is_named(t, *name_2)]
    threes = [t for t in facts["things"] if is_named(t, *name_3)]
    return any(
        related(one, relation, two) and three not in (one, two)
        for one in ones
        for two in twos
        for three in threes
    )


def is_at(thing, place):
    return place is None or place == place_name(thing)


def is_named(thing, size, colour, shape):
    right_size = not size or SIZE_WORDS[size] == thing["size"]
    return right_size and colour == thing["colour"] and SHAPE_WORDS[shape] == thing["shape"]


def place_name(thing):
    row = ("top", "middle", "bottom")[thing["row"]]
    column = ("left", "middle", "right")[thing["column"]]
    return "middle" if row == column == "middle" else f"{row} {column}"


def related(one, relation, two):
    """Left, right, above and below, read off the middles of the boxes and not off the grid."""
    (x_1, y_1), (x_2, y_2) = middle(one["box"]), middle(two["box"])
    gap = 17  # pixels of 112; less is the jitter of two things in one row or column
    return {
        "left of": x_2 - x_1 > gap,
        "right of": x_1 - x_2 > gap,
        "above": y_2 - y_1 > gap,
        "below": y_1 - y_2 > gap,
        ",": True,
    }[relation]


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def dense_errors(text, facts):
    """Return how many facts a dense text (states rightly, states wrongly, leaves out)."""
    sentences = re.findall(r"[^.]+", text.lower())
    told = [s for s in sentences if words_of(s) & {*DENSE_SHAPE, "item"}]
    things = sorted(facts["things"], key=lambda t: (t["row"], t["column"]))
    counts = Counter()
    for sentence, thing in zip(told, things, strict=True):
        counts[state(DENSE_SIZE, sentence, thing["size"])] += 1
        counts[state(DENSE_COLOUR, sentence, thing["colour"])] += 1
        counts[state(DENSE_SHAPE, sentence, thing["shape"])] += 1
        counts[state(DENSE_PLACE, sentence, (thing["row"], thing["column"]))] += 1
    return counts


def state(table, sentence, fact):
    found = [table[word] for word in words_of(sentence) & set(table)]
    assert len(found) <= 1, sentence
    return "left out" if not found else "right" if found[0] == fact else "wrong"


def words_of(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def folder_bytes(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(root, sizes=SIZES)
    return root


@pytest.fixture(scope="module")
def images(root):
    return [image for split in SPLITS for image in read_split(root, split)]


@pytest.fixture(scope="module")
def pairs():
    return [invent_pair(np.random.default_rng(seed)) for seed in range(150)]


def test_layout_is_that_of_flickr30k(root):
    names = json.loads((root / "id_mapping.json").read_text())
    assert names == {str(i): f"{i:06d}.jpg" for i in range(sum(SIZES))}
    assert sorted(path.name for path in (root / "images").iterdir()) == sorted(names.values())
    first = 0
    for split, size in zip(SPLITS, SIZES, strict=True):
        ids = [int(line) for line in (root / f"{split}_ids.txt").read_text().splitlines()]
        assert ids == [i for i in range(first, first + size) for _ in range(5)]
        assert len((root / f"{split}_caps.txt").read_text().splitlines()) == 5 * size
        dense = [json.loads(line) for line in (root / f"scenes_{split}.jsonl").open()]
        assert [d["image_id"] for d in dense] == list(range(first, first + size))
        assert all(d["file_name"] == names[str(d["image_id"])] for d in dense)
        first += size


@pytest.mark.parametrize("image_size", [64, 96, 224])
def test_images_have_the_size_asked_for(tmp_path, image_size):
    generate_scenes(tmp_path, sizes=(2, 2, 2), image_size=image_size)
    image = cv2.imread(str(tmp_path / "images" / "000005.jpg"))
    assert image.shape == (image_size, image_size, 3)


def test_same_seed_same_bytes(root, tmp_path):
    generate_scenes(tmp_path, sizes=SIZES)
    assert folder_bytes(tmp_path) == folder_bytes(root)


def test_another_seed_gives_other_images(root, tmp_path):
    generate_scenes(tmp_path, sizes=SIZES, seed=1)
    ours, theirs = folder_bytes(root), folder_bytes(tmp_path)
    jpegs = [name for name in ours if name.suffix == ".jpg"]
    assert jpegs
    assert not any(ours[name] == theirs[name] for name in jpegs)


def test_a_split_does_not_depend_on_the_other_splits_sizes(root, tmp_path):
    generate_scenes(tmp_path, sizes=(2, 2, SIZES[2]))
    assert (tmp_path / "test_caps.txt").read_bytes() == (root / "test_caps.txt").read_bytes()


def test_siblings_differ_in_exactly_one_fact(images):
    kinds = set()
    for (one, _, _), (two, _, _) in zip(images[::2], images[1::2], strict=True):
        assert (one["sibling_id"], two["sibling_id"]) == (two["image_id"], one["image_id"])
        assert one["split"] == two["split"]
        assert one["differs_in"] == two["differs_in"]
        kinds.add(one["differs_in"]["kind"])
        assert differences(one, two) == one["differs_in"]["kind"]
    assert kinds == set(scenes.CHANGES)


def differences(one, two):
    """Return the one fact in which two scenes differ; fail where there are more or none."""
    found, moved = [], []
    for a, b in zip(one["things"], two["things"], strict=True):
        found += [key for key in ("colour", "shape", "size") if a[key] != b[key]]
        if cell(a) != cell(b):
            moved.append((cell(a), cell(b)))
    if len(moved) == 1:
        found.append("place")
    elif len(moved) == 2 and moved[0] == moved[1][::-1]:
        found.append("relation")
    else:
        assert not moved
    assert len(found) == 1
    return found[0]


def cell(thing):
    return thing["row"], thing["column"]


def test_things_are_distinct_and_in_cells_of_their_own(images):
    for facts, _, _ in images:
        things = facts["things"]
        assert 4 <= len(things) <= 6
        assert len({cell(t) for t in things}) == len(things)
        assert len({(t["shape"], t["colour"]) for t in things}) == len(things)


def test_captions_are_true_of_their_image(images):
    assert all(holds(caption, facts) for facts, five, _ in images for caption in five)


def test_captions_tell_an_image_from_its_sibling(images):
    facts = {image["image_id"]: image for image, _, _ in images}
    for image, five, _ in images:
        sibling = facts[image["sibling_id"]]
        assert sum(not holds(caption, sibling) for caption in five) >= 3


def test_captions_mention_every_thing(images):
    for facts, five, _ in images:
        names = [m for caption in five for m in re.findall(NAME, caption)]
        for thing in facts["things"]:
            assert any(is_named(thing, *name) for name in names)


def test_facts_say_which_things_a_caption_names(images):
    for facts, five, _ in images:
        for caption, named in zip(five, facts["named"], strict=True):
            assert len(set(named)) == 3
            names = re.findall(NAME, caption)
            things = [facts["things"][index] for index in named]
            assert all(is_named(thing, *name) for thing, name in zip(things, names, strict=True))


def test_captions_of_one_image_name_different_things(images):
    assert all(len({frozenset(named) for named in facts["named"]}) > 1 for facts, _, _ in images)


def test_things_take_up_little_of_the_picture(images):
    """The measure of the data set: what is named lies on 8 to 15 % of the picture."""
    for facts, _, _ in images:
        covered = np.zeros((112, 112), bool)
        for thing in facts["things"]:
            x0, y0, x1, y1 = thing["box"]
            covered[y0:y1, x0:x1] = True
        assert 0.07 < covered.mean() < 0.16  # of rounded boxes
        assert facts["boxed_share"] == pytest.approx(covered.mean(), abs=1e-3)


def test_captions_are_short_with_few_words_and_seldom_repeat(images):
    captions = [caption for _, five, _ in images for caption in five]
    assert all(6 <= len(caption.split()) <= 19 for caption in captions)
    assert len({word for caption in captions for word in caption.split()}) < 150
    assert len(set(captions)) > 0.95 * len(captions)


def test_captions_pick_out_their_image(images):
    """The median caption of the data set is true of one or two images, siblings included."""
    everything = [facts for facts, _, _ in images]
    true_of = [
        sum(holds(caption, facts) for facts in everything)
        for _, five, _ in images
        for caption in five
    ]
    assert np.median(true_of) <= 2
    assert np.mean(true_of) < 4


def test_dense_texts_have_words_of_their_own(images):
    captions = {word for _, five, _ in images for caption in five for word in words_of(caption)}
    dense = {word for _, _, text in images for word in words_of(text)}
    assert captions & dense <= FUNCTION_WORDS
    assert all(40 <= len(text.split()) <= 65 for _, _, text in images)


def test_dense_length_holds_for_every_number_of_things_and_error():
    for rate in (0, 0.1, 1):
        for seed in range(120):
            rng = np.random.default_rng(seed)
            scene, _, _ = invent_pair(rng)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("lib.data.scenes.texts.DENSE_ERROR_RATE", rate or 1e-9)
                words = scenes.write_dense_text(scene, rng).split()
            assert 40 <= len(words) <= 65


def test_a_tenth_of_the_dense_facts_is_wrong_or_left_out(images):
    counts = sum((dense_errors(text, facts) for facts, _, text in images), Counter())
    total = sum(counts.values())
    assert total > 800
    assert counts["wrong"] / total == pytest.approx(0.05, abs=0.02)
    assert counts["left out"] / total == pytest.approx(0.05, abs=0.02)


def test_no_thing_is_hidden(pairs):
    for one, two, _ in pairs:
        assert min(visible_shares(one)) >= 0.7
        assert min(visible_shares(two)) >= 0.7


def test_clutter_has_no_colour_that_captions_know():
    for seed in range(40):
        pixels = draw_clutter(seed, 112).reshape(-1, 1, 3).astype(int)
        distances = np.abs(pixels - np.array(list(RGB.values()))).sum(-1)
        assert distances.min() > 60


def test_clutter_is_a_patchwork_and_the_same_for_siblings(pairs):
    grounds = [draw_clutter(one.clutter, 112) for one, _, _ in pairs[:20]]
    tones = [len(np.unique(ground.reshape(-1, 3), axis=0)) for ground in grounds]
    assert min(tones) > 20
    assert all(one.clutter == two.clutter for one, two, _ in pairs)
    assert len({one.clutter for one, _, _ in pairs}) == len(pairs)


@pytest.mark.parametrize("image_size", [64, 96, 224])
def test_a_box_is_where_its_thing_is(image_size):
    empty = scenes.Scene(7, ())
    for index, shape in enumerate(scenes.SHAPES):
        cell = divmod(index, 3)
        thing = Thing(shape, "yellow", "big", *cell, spread=0.4, offset=(5.3, -2.1))
        alone = draw_scene(scenes.Scene(7, (thing,)), image_size)
        difference = np.abs(alone.astype(int) - draw_scene(empty, image_size))
        changed = difference.max(-1) > 2  # of 255 levels: a smooth line has a fringe
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        box = thing_box(thing, image_size)
        assert np.abs(np.subtract(box, seen)).max() <= 1
        assert min(box) >= 0
        assert max(box) <= image_size


def test_the_pixels_have_the_colours_of_the_facts(root, images):
    """Most pixels of the colour's exact hue inside a box: a swapped channel or name shows up."""
    for facts, _, _ in images[:20]:
        path = root / "images" / f"{facts['image_id']:06d}.jpg"
        image = cv2.imread(str(path))[:, :, ::-1].astype(int)
        for thing in facts["things"]:
            x0, y0, x1, y1 = thing["box"]
            pixels = image[y0:y1, x0:x1].reshape(-1, 1, 3)
            distances = np.abs(pixels - np.array(list(RGB.values()))).sum(-1)
            near = distances.argmin(1)[distances.min(1) < 60]
            assert (near == list(RGB).index(thing["colour"])).sum() >= 15


def test_siblings_differ_in_the_picture_too(root, images):
    paths = [root / "images" / f"{facts['image_id']:06d}.jpg" for facts, _, _ in images]
    assert all(a.read_bytes() != b.read_bytes() for a, b in pairwise(paths))


def test_a_finished_folder_is_left_alone(tmp_path):
    settings = {"sizes": (2, 2, 2), "image_size": 64, "seed": 3}
    assert not scenes_ready(tmp_path, **settings)
    generate_scenes(tmp_path, **settings)
    assert scenes_ready(tmp_path, **settings)
    (tmp_path / "images" / "000000.jpg").write_bytes(b"mine")
    generate_scenes(tmp_path, **settings)
    assert (tmp_path / "images" / "000000.jpg").read_bytes() == b"mine"


def test_an_interrupted_generation_is_redone(tmp_path):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_scenes(tmp_path / "a", sizes=(4, 2, 2), progress=interrupt)
    assert not scenes_ready(tmp_path / "a", sizes=(4, 2, 2))
    generate_scenes(tmp_path / "a", sizes=(4, 2, 2))
    generate_scenes(tmp_path / "b", sizes=(4, 2, 2))
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_an_interruption_by_other_settings_spoils_the_old_mark(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    generate_scenes(tmp_path, sizes=(2, 2, 2))
    with pytest.raises(KeyboardInterrupt):
        generate_scenes(tmp_path, sizes=(2, 2, 2), seed=5, progress=interrupt)
    assert not scenes_ready(tmp_path, sizes=(2, 2, 2))


def test_other_settings_replace_the_folder(tmp_path):
    generate_scenes(tmp_path, sizes=(6, 2, 2))
    generate_scenes(tmp_path, sizes=(2, 2, 2), seed=5)
    assert len(list((tmp_path / "images").iterdir())) == 6
    assert scenes_ready(tmp_path, sizes=(2, 2, 2), seed=5)
    assert not scenes_ready(tmp_path, sizes=(2, 2, 2))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_broken_mark_means_not_ready(tmp_path, text):
    (tmp_path / "scenes.json").write_text(text)
    assert not scenes_ready(tmp_path)


def test_progress_counts_images(tmp_path):
    calls = []
    generate_scenes(tmp_path, sizes=(4, 2, 2), progress=lambda *call: calls.append(call))
    assert calls == [(2, 8), (4, 8), (6, 8), (8, 8)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image_size": 63}, "image_size 63: .*64 to 224"),
        ({"image_size": 225}, "image_size 225"),
        ({"sizes": (4, 3, 2)}, r"sizes \[4, 3, 2\]: .*even"),
        ({"sizes": (4, 0, 2)}, "at least 2"),
        ({"sizes": (4, 2)}, "three"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        generate_scenes(tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()
