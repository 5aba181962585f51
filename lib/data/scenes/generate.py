"""The embedded data set `scenes`: drawn pictures, captions and dense texts, made from a seed.

A scene holds four to six things on a 3 x 3 grid; each binds a shape, a colour, a size and a place.
Their boxes take up 8 to 15 % of the picture; the rest is clutter that no text names, so that there
is much to leave out. Scenes come in sibling pairs that differ in exactly one fact, so that only a
model that binds the facts ranks them apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np

from lib.data.scenes.drawing import (
    Change,
    Scene,
    Thing,
    boxed_share,
    draw_scene,
    thing_box,
    visible_shares,
)
from lib.data.scenes.texts import (
    COLOURS,
    SHAPES,
    SIZES,
    pick,
    write_captions,
    write_dense_text,
)
from lib.errors import InputError

FORMAT, VERSION = "scenes", 4
SPLITS = ("train", "dev", "test")
CHANGES = ("colour", "shape", "size", "place", "relation")
MIN_VISIBLE = 0.7  # share of a thing's area that nothing in front of it may hide
BOXED = (0.08, 0.15)  # share of the picture that the things' boxes take up
JITTER = 8.0  # how far a thing may lie off its cell's centre, in units of a 96-pixel image


def invent_pair(rng: np.random.Generator) -> tuple[Scene, Scene, Change]:
    """Return two scenes that differ in one fact, and that fact; no thing of either is hidden."""
    while True:
        scene = invent_scene(rng)
        change = _choose_change(scene, rng)
        sibling = apply_change(scene, change, rng)
        pair = (scene, sibling)
        seen = min(min(visible_shares(one)) for one in pair) >= MIN_VISIBLE
        if seen and all(BOXED[0] <= boxed_share(one) <= BOXED[1] for one in pair):
            return scene, sibling, change


def invent_scene(rng: np.random.Generator) -> Scene:
    """Return a scene whose things draw from four colours and four shapes.

    So few make each colour and shape occur in several bindings: the words of a caption that is
    wrong are then mostly in the picture too. No two things have both colour and shape in common.
    """
    shapes = rng.permutation(list(SHAPES))[:4].tolist()
    colours = rng.permutation(list(COLOURS))[:4].tolist()
    count = int(rng.integers(4, 7))
    looks = rng.permutation(len(shapes) * len(colours))[:count].tolist()
    cells = rng.permutation(9)[:count].tolist()
    things = [
        Thing(
            shape=shapes[look // 4],
            colour=colours[look % 4],
            size=pick(rng, list(SIZES)),
            row=cell // 3,
            column=cell % 3,
            spread=float(rng.random()),
            offset=(float(rng.uniform(-JITTER, JITTER)), float(rng.uniform(-JITTER, JITTER))),
        )
        for look, cell in zip(looks, cells, strict=True)
    ]
    return Scene(int(rng.integers(2**31)), tuple(things))


def _choose_change(scene: Scene, rng: np.random.Generator) -> Change:
    kind = pick(rng, CHANGES)
    order = rng.permutation(len(scene.things)).tolist()
    return Change(kind, tuple(order[: 2 if kind == "relation" else 1]))


def apply_change(scene: Scene, change: Change, rng: np.random.Generator) -> Scene:
    """Return the sibling of `scene`; a changed relation is two things that exchange places."""
    things = list(scene.things)
    first = things[change.things[0]]
    if change.kind == "relation":
        second = things[change.things[1]]
        things[change.things[1]] = replace(second, row=first.row, column=first.column)
        things[change.things[0]] = replace(first, row=second.row, column=second.column)
    else:
        things[change.things[0]] = _changed_thing(first, change.kind, things, rng)
    return replace(scene, things=tuple(things))


def _changed_thing(
    thing: Thing, kind: str, things: Sequence[Thing], rng: np.random.Generator
) -> Thing:
    if kind == "size":
        return replace(thing, size="big" if thing.size == "small" else "small")
    if kind == "place":
        taken = {other.cell for other in things}
        free = [divmod(cell, 3) for cell in range(9) if divmod(cell, 3) not in taken]
        row, column = pick(rng, free)
        return replace(thing, row=row, column=column)
    looks = {(other.shape, other.colour) for other in things}
    if kind == "colour":
        colours = [colour for colour in COLOURS if (thing.shape, colour) not in looks]
        return replace(thing, colour=pick(rng, colours))
    shapes = [shape for shape in SHAPES if (shape, thing.colour) not in looks]
    return replace(thing, shape=pick(rng, shapes))


def generate_scenes(
    root: Path | str,
    *,
    sizes: Sequence[int] = (4000, 200, 200),
    image_size: int = 112,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the data set into the folder `root`, in the layout of Flickr30K.

    `sizes` are the images of train, dev and test; `progress(done, total)` is called after each pair
    of images. Returns at once where the folder holds the same data set already. `scenes.json`
    is written last, so an interrupted generation starts again. A split's images do not depend on
    how many others there are. Raises InputError (a ValueError) for settings out of range.
    """
    settings = _settings(sizes, image_size, seed)
    if scenes_ready(root, sizes=sizes, image_size=image_size, seed=seed):
        return
    root = Path(root)
    _clear(root)
    records: list[dict] = []
    total = sum(sizes)
    for split_index, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        for pair in range(size // 2):
            rng = np.random.default_rng((seed, split_index, pair))
            records += _write_pair(root, split, len(records), image_size, rng)
            if progress is not None:
                progress(len(records), total)
    _write_texts(root, records)
    partial = root / "scenes.json.part"
    partial.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    os.replace(partial, root / "scenes.json")


def scenes_ready(
    root: Path | str,
    *,
    sizes: Sequence[int] = (4000, 200, 200),
    image_size: int = 112,
    seed: int = 0,
) -> bool:
    """Return whether `root` holds the finished data set of exactly these settings."""
    try:
        found = json.loads((Path(root) / "scenes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == _settings(sizes, image_size, seed)


def _settings(sizes: Sequence[int], image_size: int, seed: int) -> dict:
    sizes = list(sizes)
    if len(sizes) != len(SPLITS) or any(size < 2 or size % 2 for size in sizes):
        raise InputError(
            f"sizes {sizes}: give three even numbers of at least 2, the images of train, dev and "
            "test (images come in pairs)"
        )
    if not 64 <= image_size <= 224:
        raise InputError(f"image_size {image_size}: give a number of pixels from 64 to 224")
    if seed < 0:
        raise InputError(f"seed {seed}: give a whole number of at least 0")
    return {
        "format": FORMAT,
        "version": VERSION,
        "sizes": sizes,
        "image_size": image_size,
        "seed": seed,
    }


def _clear(root: Path) -> None:
    """Make the folders, without the mark of completion and the images of an earlier generation."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "scenes.json").unlink(missing_ok=True)
    for image in (root / "images").glob("[0-9]*.jpg"):
        image.unlink()


def _write_pair(
    root: Path, split: str, first_id: int, image_size: int, rng: np.random.Generator
) -> list[dict]:
    """Write two sibling images; return what the text files say about them."""
    *scenes, change = invent_pair(rng)
    records = []
    for scene, image_id in zip(scenes, (first_id, first_id + 1), strict=True):
        name = f"{image_id:06d}.jpg"
        pixels = cv2.cvtColor(draw_scene(scene, image_size), cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        (root / "images" / name).write_bytes(encoded.tobytes())
        captions = write_captions(scene, change, rng)
        records.append(
            {
                "split": split,
                "image_id": image_id,
                "file_name": name,
                "captions": [caption.text for caption in captions],
                "text": write_dense_text(scene, rng),
                "facts": {
                    "sibling_id": 2 * first_id + 1 - image_id,
                    "differs_in": asdict(change),
                    "boxed_share": round(boxed_share(scene, image_size), 4),
                    "named": [caption.things for caption in captions],
                    "things": [_thing_facts(thing, image_size) for thing in scene.things],
                },
            }
        )
    return records


def _thing_facts(thing: Thing, image_size: int) -> dict:
    return {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size,
        "row": thing.row,
        "column": thing.column,
        "box": thing_box(thing, image_size),
    }


def _write_texts(root: Path, records: Sequence[dict]) -> None:
    for split in SPLITS:
        mine = [record for record in records if record["split"] == split]
        captions = [caption for record in mine for caption in record["captions"]]
        ids = [str(record["image_id"]) for record in mine for _ in record["captions"]]
        dense = [_json_line(record, "image_id", "file_name", "text") for record in mine]
        _write_lines(root / f"{split}_caps.txt", captions)
        _write_lines(root / f"{split}_ids.txt", ids)
        _write_lines(root / f"scenes_{split}.jsonl", dense)
    facts = [
        json.dumps({"image_id": r["image_id"], "split": r["split"], **r["facts"]}) for r in records
    ]
    _write_lines(root / "scenes_facts.jsonl", facts)
    names = {str(record["image_id"]): record["file_name"] for record in records}
    (root / "id_mapping.json").write_text(json.dumps(names) + "\n", encoding="utf-8")


def _json_line(record: dict, *keys: str) -> str:
    return json.dumps({key: record[key] for key in keys})


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
