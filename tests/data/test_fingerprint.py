"""A fingerprint is the same for the same data and tells every change of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lib.data.fingerprint import fingerprint_differences, split_fingerprint
from lib.data.splits import Split


def a_split(**changes) -> Split:
    split = Split(
        dataset="f30k",
        name="train",
        captions=["a dog", "a cat", "a man", "two men"],
        image_ids=["7", "9"],
        image_files=["7.jpg", "9.jpg"],
        caption_image=np.array([0, 0, 1, 1]),
        dense=["a long text", "another"],
    )
    return replace(split, **changes)


def differences(**changes) -> list[str]:
    return fingerprint_differences(
        split_fingerprint(a_split()), split_fingerprint(a_split(**changes))
    )


def test_the_same_data_differs_in_nothing():
    assert differences() == []
    assert differences(image_files=["/elsewhere/7.jpg", "/elsewhere/9.jpg"]) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"captions": ["a cat", "a dog", "a man", "two men"]}, "the captions' words or order"),
        ({"image_ids": ["7", "8"]}, "the image ids"),
        ({"caption_image": np.array([0, 1, 0, 1])}, "the image ids"),
        ({"dense": ["another", "a long text"]}, "the dense texts"),
        ({"dataset": "coco"}, "dataset coco (was f30k)"),
        ({"name": "held_out"}, "split held_out (was train)"),
        (
            {"captions": ["a dog", "a man"], "caption_image": np.array([0, 1])},
            "2 captions (was 4)",
        ),
    ],
)
def test_a_change_is_named(changes, told):
    assert differences(**changes) == [told]


def test_words_do_not_run_into_each_other():
    assert differences(captions=["a dog\na cat", "a man", "two men", ""]) != []
    assert split_fingerprint(a_split(captions=["ab", "c", "d", "e"])) != split_fingerprint(
        a_split(captions=["a", "bc", "d", "e"])
    )


def test_dense_texts_that_were_not_read_are_not_compared():
    assert differences(dense=None) == []
