"""Where dense texts are cut: 256 word pieces, what the encoder reads, or as the released code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data import dense_cut, dense_words, training_loader, validation_loaders
from lib.data.splits import Split
from lib.methods.registry import build_model, get_method
from tests.helpers import VOCABULARY, tiny_args
from vocab import WordTokenizer, learn_vocabulary

LONG = " ".join(["word"] * 600)
SPLIT = Split("f30k", "train", ["a word"] * 3, ["1", "2", "3"], [], np.arange(3), [LONG, LONG, "a"])
TOKENIZER = WordTokenizer(learn_vocabulary(["a word"]))


@pytest.mark.parametrize(
    ("method", "given", "training", "evaluation"),
    [
        ("seps", None, 256, 256),
        ("seps", 0, 40, 40),
        ("seps", 30, 30, 30),
        ("dense_text", None, 256, 256),
        ("seps_released", None, 512, 40),
        ("seps_released", 300, 300, 300),
    ],
)
def test_dense_texts_are_cut_where_the_method_says(method, given, training, evaluation):
    args = tiny_args(method, max_dense_word=given)
    method_class = get_method(method)
    assert method_class.dense_words(args, training=True) == training
    assert method_class.dense_words(args, training=False) == evaluation
    model = build_model(args, VOCABULARY)
    assert model.text_encoder.max_positions >= max(training, 64)
    args.text_positions = 128  # as a smaller encoder's
    assert dense_words(args, training=True) == min(128, training)


def test_the_loaders_cut_there():
    args = tiny_args("dense_text", max_dense_word=None, workers=0, batch_size=3)
    args.image_augment = args.size_augment = args.sibling_share = 0
    args.text_positions = 200
    reading = (SPLIT, TOKENIZER, "image", False)
    batch, _ = next(training_loader(args, *reading).batches(0))
    assert sorted(batch.dense_lengths.tolist()) == [3, 200, 200]
    images = next(iter(validation_loaders(args, *reading).images))
    assert images.dense_lengths.tolist() == [200, 200, 3]


def test_the_share_that_is_cut_is_told():
    args = tiny_args("seps", max_dense_word=None)
    told = dense_cut(args, SPLIT, TOKENIZER)
    assert told == "dense texts of train: 67 % cut at 256 word pieces, median 602"
    many = dataclasses.replace(SPLIT, dense=[LONG] * 2001)
    assert "100 % of 2,000 sampled cut at 256" in dense_cut(args, many, TOKENIZER)
