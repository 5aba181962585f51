"""Text against text: what the numbers are made of, and the tool's table."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from lib.retrieval.text_baseline import encoder_similarity, tfidf_similarity
from tests.conftest import write_layout
from tools import text_baseline

DENSE = ["a red boat on the sea", "two dogs run on grass", "a child eats a red apple"]
CAPTIONS = ["a boat", "dogs running on grass", "an apple", "the red apple"]


def test_tfidf_finds_the_image_that_shares_the_rare_words():
    similarity = tfidf_similarity(DENSE, CAPTIONS)
    assert similarity.shape == (3, 4)
    assert similarity.dtype == np.float32
    assert similarity.argmax(0).tolist() == [0, 1, 2, 2]
    assert similarity[1, 0] == 0  # no word in common
    assert similarity[2, 2] == pytest.approx(rare_word_cosine(), abs=1e-6)


def rare_word_cosine() -> float:
    """Cosine of 'an apple' (apple alone is known) with the third text, written out."""
    idf = {"child": 2, "eats": 2, "apple": 2, "red": 3}
    known = {word: np.log(4 / (1 + {2: 1, 3: 2}[df])) + 1 for word, df in idf.items()}
    return known["apple"] / np.sqrt(sum(value**2 for value in known.values()))


def test_an_encoder_gives_the_cosine_of_means_over_real_tokens(backbones):
    seen = []
    together = encoder_similarity(backbones["bert"], DENSE, CAPTIONS, seen.append)
    alone = [encoder_similarity(backbones["bert"], [text], CAPTIONS)[0] for text in DENSE]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)  # padding changes nothing
    same = encoder_similarity(backbones["bert"], DENSE, DENSE)
    np.testing.assert_allclose(np.diag(same), 1, atol=1e-5)
    assert sum(seen) == 7


def test_the_tool_prints_both_rows(layouts, backbones, capsys):
    argv = ["--dataset", "f30k", "--data_path", str(layouts)]
    assert text_baseline.main([*argv, "--encoder", backbones["bert"]]) == 0
    printed = capsys.readouterr().out
    assert "protocol image: 8 dense texts" in printed
    assert {line.split()[0] for line in printed.splitlines()[-2:]} == {"tf-idf", "encoder"}
    assert text_baseline.main([*argv, "--split", "dev"]) == 2
    assert "tools.describe --dataset f30k --split dev" in capsys.readouterr().err
    assert text_baseline.main([*argv, "--encoder", "./nowhere"]) == 2
    assert "--encoder ./nowhere can't be loaded" in capsys.readouterr().err


def test_texts_that_repeat_the_captions_are_an_oracle(tmp_path, capsys):
    write_layout(tmp_path, "f30k", images=2)
    captions = (tmp_path / "f30k" / "test_caps.txt").read_text().splitlines()
    lines = [json.dumps({"text": f"It shows: {captions[5 * row]}."}) for row in range(2)]
    (tmp_path / "f30k" / "f30k_test.jsonl").write_text("\n".join(lines) + "\n")
    assert text_baseline.main(["--dataset", "f30k", "--data_path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "protocol oracle: 2 dense texts" in printed
    assert "not comparable" in printed
