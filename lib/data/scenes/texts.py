"""Captions and dense texts of a scene.

A caption and a dense text never use the same word for a fact: the tables below hold both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import numpy as np

from lib.data.scenes.drawing import Change, Scene, Thing

CAPTIONS_PER_IMAGE = 5
DENSE_ERROR_RATE = 0.1  # of the facts of a dense text: half are wrong, half are left out
DENSE_MIN_WORDS = 40

# fact -> (caption words, dense word)
SHAPES = {
    "circle": (("circle", "ball"), "disc"),
    "square": (("square", "box"), "block"),
    "triangle": (("triangle",), "wedge"),
    "star": (("star",), "pentagram"),
    "cross": (("cross",), "plus"),
    "ring": (("ring",), "hoop"),
    "heart": (("heart",), "valentine"),
}
COLOURS = {
    "red": (("red",), "crimson"),
    "green": (("green",), "emerald"),
    "blue": (("blue",), "cobalt"),
    "yellow": (("yellow",), "golden"),
    "purple": (("purple",), "violet"),
    "orange": (("orange",), "tangerine"),
    "pink": (("pink",), "rose"),
    "cyan": (("cyan",), "turquoise"),
}
SIZES = {"small": (("small", "little"), "tiny"), "big": (("big", "large"), "huge")}
PLACES = {  # the key is "row column", both from 0, top left first
    "0 0": (("top left",), "northwest"),
    "0 1": (("top middle",), "north"),
    "0 2": (("top right",), "northeast"),
    "1 0": (("middle left",), "west"),
    "1 1": (("middle",), "centre"),
    "1 2": (("middle right",), "east"),
    "2 0": (("bottom left",), "southwest"),
    "2 1": (("bottom middle",), "south"),
    "2 2": (("bottom right",), "southeast"),
}
DENSE_FORMS = {  # number of things -> the sentence for one of them; few things are told at length
    4: ("Notice {}", " toward the {} of the picture"),
    5: ("There is {}", " over in the {}"),
    6: ("{}", " in the {}"),
}
DENSE_FILLERS = (
    "The overall picture is simple, clean and easy to understand.",
    "Its flat tones give a playful and cheerful impression overall.",
    "No people, animals or written words appear anywhere within it.",
    "The arrangement feels casual, as if somebody had scattered it quickly.",
)

Item = TypeVar("Item")


def pick(rng: np.random.Generator, options: Sequence[Item]) -> Item:
    """Return one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


@dataclass(frozen=True)
class Caption:
    """What a caption says, and which of the scene's things it names."""

    text: str
    things: tuple[int, ...]


def write_captions(scene: Scene, change: Change, rng: np.random.Generator) -> list[Caption]:
    """Return five captions of three things each; three of them are false of the sibling.

    Together they mention every thing of the scene.
    """
    others = rng.permutation([i for i in range(len(scene.things)) if i not in change.things])
    # With one thing left beside a changed relation, the two things that changed help out.
    turn = cycle(others.tolist() + list(change.things if len(others) < 2 else ()))
    plans = _telling_plans(change, turn)
    plans += [(kind, next(turn), next(turn)) for kind in ("place", "relation")]
    captions = [_caption(scene, *plan, change, rng) for plan in plans]
    return [captions[i] for i in rng.permutation(CAPTIONS_PER_IMAGE)]


def _telling_plans(change: Change, turn: Iterator[int]) -> list[tuple[str, int, int]]:
    """Return (kind of caption, first thing, second thing) of three that state what changed."""
    thing = change.things[0]
    if change.kind == "relation":
        second = change.things[1]
        pair = [("relation", thing, second), ("relation", second, thing)]
        return [*pair, ("place", thing, next(turn))]
    if change.kind == "place":
        kinds = ["place", "place", "place"]
    else:
        kinds = ["place", "relation", "relation"]
    return [(kind, thing, next(turn)) for kind in kinds]


def _caption(
    scene: Scene, kind: str, first: int, second: int, change: Change, rng: np.random.Generator
) -> Caption:
    named = (first, second, _third(scene, first, second, rng))
    one, two, three = (scene.things[i] for i in named)
    sized = change.kind == "size" and first in change.things
    name_one = _caption_name(one, sized or rng.random() < 0.5, rng)
    name_two = _caption_name(two, rng.random() < 0.5, rng)
    name_three = _caption_name(three, False, rng)
    if kind == "relation":
        text = f"{name_one} {pick(rng, relations(one, two))} {name_two} and {name_three}"
    else:
        place = pick(rng, PLACES[one.place][0])
        text = f"{name_one} in the {place} , {name_two} and {name_three}"
    return Caption(text, named)


def _third(scene: Scene, first: int, second: int, rng: np.random.Generator) -> int:
    """Return a thing beside the two that a caption is about; a scene has at least four."""
    return pick(rng, [i for i in range(len(scene.things)) if i not in (first, second)])


def relations(one: Thing, two: Thing) -> list[str]:
    """Return every relation that holds from `one` to `two`; it compares rows and columns."""
    holds = {
        "left of": one.column < two.column,
        "right of": one.column > two.column,
        "above": one.row < two.row,
        "below": one.row > two.row,
    }
    return [relation for relation, true in holds.items() if true]


def _caption_name(thing: Thing, sized: bool, rng: np.random.Generator) -> str:
    words = [pick(rng, COLOURS[thing.colour][0]), pick(rng, SHAPES[thing.shape][0])]
    if sized:
        words.insert(0, pick(rng, SIZES[thing.size][0]))
    return _with_article(words)


def _with_article(words: Sequence[str]) -> str:
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def write_dense_text(scene: Scene, rng: np.random.Generator) -> str:
    """Return 40 to 65 words that state every fact of the scene, in reading order.

    As from a multimodal language model, about one fact in ten is wrong or missing.
    """
    lead, tail = DENSE_FORMS[len(scene.things)]
    sentences = []
    for thing in sorted(scene.things, key=lambda thing: thing.cell):
        size = _reported(SIZES, thing.size, rng)
        colour = _reported(COLOURS, thing.colour, rng)
        shape = _reported(SHAPES, thing.shape, rng) or "item"
        where = _reported(PLACES, thing.place, rng)
        name = _with_article([word for word in (size, colour, shape) if word])
        sentences.append(lead.format(name) + (tail.format(where) if where else "") + ".")
    for filler in rng.permutation(DENSE_FILLERS).tolist():
        if sum(len(sentence.split()) for sentence in sentences) < DENSE_MIN_WORDS:
            sentences.append(filler)
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _reported(
    table: dict[str, tuple[tuple[str, ...], str]], fact: str, rng: np.random.Generator
) -> str | None:
    """Return the dense word for the fact, or for a wrong one, or None where it is left out."""
    draw = rng.random() / DENSE_ERROR_RATE
    if draw < 0.5:
        return None
    if draw < 1:
        fact = pick(rng, [other for other in table if other != fact])
    return table[fact][1]
