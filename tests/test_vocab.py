"""Word ids: BERT's WordPiece by hand, whole words, augmentation, learnt vocabularies."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from vocab import (
    SPECIAL_TOKENS,
    CaptionTokenizer,
    WordTokenizer,
    caption_words,
    checkpoint_tokenizer,
    learn_vocabulary,
    learn_words,
    load_tokenizer,
)

TOKENS = [*SPECIAL_TOKENS, "a", "cat", "creme", "play", "##ing", "##s", "'", "s", ".", "-", "toy"]
ID = {token: index for index, token in enumerate(TOKENS)}


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(TOKENS)


def ids_of(*tokens: str) -> list[int]:
    return [ID[token] for token in tokens]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A cat .", ["a", "cat", "."]),
        ("Crème cats", ["creme", "cat", "##s"]),
        ("cat's toy-cat.", ["cat", "'", "s", "toy", "-", "cat", "."]),
        ("playing\tzebra", ["play", "##ing", "[UNK]"]),
        ("", []),
    ],
)
def test_wordpiece_by_hand(tokenizer, text, tokens):
    assert tokenizer.encode(text, 32) == ids_of("[CLS]", *tokens, "[SEP]")


def test_cut_keeps_sep_and_words_agree_with_ids(tokenizer):
    text = "a cat playing cats"
    for max_word in range(2, 10):
        ids = tokenizer.encode(text, max_word)
        assert len(ids) <= max_word
        assert ids[0] == ID["[CLS]"]
        assert ids[-1] == ID["[SEP]"]
        words = tokenizer.encode_words(text, max_word)
        assert ids == [ID["[CLS]"], *(one for word in words for one in word), ID["[SEP]"]]
    assert tokenizer.encode_words(text, 32) == [
        ids_of("a"),
        ids_of("cat"),
        ids_of("play", "##ing"),
        ids_of("cat", "##s"),
    ]


@settings(max_examples=40)
@given(st.text(max_size=30), st.integers(2, 20))
def test_any_text_has_ids_that_agree_with_its_words(text, max_word):
    tokenizer = WordTokenizer(TOKENS)
    ids = tokenizer.encode(text, max_word)
    words = tokenizer.encode_words(text, max_word)
    assert ids == [ID["[CLS]"], *(one for word in words for one in word), ID["[SEP]"]]
    assert len(ids) <= max_word
    augmented = tokenizer.augment(words, np.random.default_rng(0))
    assert (len(augmented) > 2) == (len(ids) > 2)


def test_punctuation_and_repeated_words_are_words_of_their_own(tokenizer):
    words = tokenizer.encode_words("cat cat's [MASK] cat", 32)
    assert words == [ids_of(one) for one in ("cat", "cat", "'", "s", "[MASK]", "cat")]


def test_same_ids_as_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    reference = transformers.BertTokenizerFast.from_pretrained(str(tmp_path))
    for text in ("A Crème playing cat's toy-cat.", "zebra [MASK] a", "日本 cat\u2028a\x85s"):
        for max_word in (4, 32):
            expected = reference(text, truncation=True, max_length=max_word)["input_ids"]
            assert tokenizer.encode(text, max_word) == expected


def test_augmentation_rates(tokenizer):
    """Of 20,000 words: 10 % masked, 2 % random, 8 % deleted, within four standard errors."""
    rng = np.random.default_rng(0)
    word = ids_of("play", "##ing")
    masked = deleted = kept = other = 0
    for _ in range(2000):
        ids = tokenizer.augment([word] * 10, rng)[1:-1]
        pairs = list(zip(ids[::2], ids[1::2], strict=True))  # a word changes as a whole
        deleted += 10 - len(pairs)
        masked += pairs.count((ID["[MASK]"], ID["[MASK]"]))
        kept += pairs.count(tuple(word))
        other += sum(min(pair) > ID["[MASK]"] and list(pair) != word for pair in pairs)
    assert masked + deleted + kept + other == 20000
    for count, rate in ((masked, 0.1), (deleted, 0.08), (other, 0.02), (kept, 0.8)):
        assert abs(count - 20000 * rate) < 4 * (20000 * rate * (1 - rate)) ** 0.5


def test_augmentation_never_empties_a_caption(tokenizer):
    rng = np.random.default_rng(0)
    lengths = {len(tokenizer.augment([ids_of("cat")], rng)) for _ in range(300)}
    assert lengths == {3}
    assert tokenizer.augment([], rng) == ids_of("[CLS]", "[SEP]")


def test_augmentation_repeats_with_its_seed(tokenizer):
    words = [ids_of("cat")] * 30
    first, again, other = (
        tokenizer.augment(words, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_learnt_vocabulary_reads_its_own_captions():
    lines = ["A cat plays .", "a cat's toy", "The toy cat"]
    tokens = learn_vocabulary(lines)
    assert tuple(tokens[:5]) == SPECIAL_TOKENS
    assert len(set(tokens)) == len(tokens)
    tokenizer = WordTokenizer(tokens)
    assert tokenizer.pad_id == 0
    assert [len(word) for word in tokenizer.encode_words("a cat's toy", 32)] == [1, 1, 1, 1, 1]
    unseen = tokenizer.encode("tact", 32)  # known characters: spelled, never [UNK]
    assert 1 not in unseen
    assert len(unseen) > 3


def test_learnt_vocabulary_prefers_frequent_words_within_size():
    lines = ["ab ab ab ba ba aab"]
    assert learn_vocabulary(lines)[5:] == ["a", "##a", "b", "##b", "ab", "ba", "aab"]
    assert learn_vocabulary(lines, size=10) == learn_vocabulary(lines)[:10]


def test_learnt_vocabulary_does_not_depend_on_the_process():
    code = (
        "from vocab import learn_vocabulary\n"
        "print(learn_vocabulary([f'w{i % 7} q{i % 11} x{i}' for i in range(99)]))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_save_and_load(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path)
    assert path == tmp_path / "vocab.txt"
    assert load_tokenizer(str(tmp_path)).tokens == TOKENS
    assert load_tokenizer("tiny", vocab_file=path).encode("a cat", 9) == tokenizer.encode(
        "a cat", 9
    )


def test_tokenizer_json_with_truncation_and_padding(tokenizer, tmp_path):
    from tokenizers import BertWordPieceTokenizer

    stored = BertWordPieceTokenizer(ID, lowercase=True)
    stored.enable_truncation(4)
    stored.enable_padding(length=8)
    stored.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode("a cat playing .", 32) == tokenizer.encode("a cat playing .", 32)


def test_tokenizer_survives_pickling_for_spawned_workers(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("a cat", 9) == tokenizer.encode("a cat", 9)
    assert again.vocab_size == len(TOKENS)


# --- wrong input -------------------------------------------------------------------------------


def refuses(message: str, bert_path: str, vocab_file=None) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(bert_path, vocab_file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_folders_without_a_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refuses("holds neither vocab.txt nor tokenizer.json", str(tmp_path))
    refuses("no such folder", str(tmp_path / "absent"))
    refuses("no such folder", "./absent")
    refuses("a file, where a folder is meant", str(tmp_path / "config.json"))


def test_refuses_vocabularies_that_are_not_berts(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\ncat\n")
    refuses("it lacks [MASK]", str(tmp_path))
    (tmp_path / "vocab.txt").write_bytes(b"caf\xe9\n")
    refuses("vocab.txt:1: not UTF-8", str(tmp_path))
    refuses("absent.txt: no such file", "tiny", tmp_path / "absent.txt")
    refuses("keeps it as vocab.txt in the run folder", "tiny")


def test_refuses_a_damaged_tokenizer_json(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    refuses("tokenizer.json: not JSON", str(tmp_path))
    from tokenizers import Tokenizer, models

    gap = json.loads(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 3}, unk_token="[UNK]")).to_str())
    path.write_text(json.dumps(gap))
    refuses("ids have gaps or repeat", str(tmp_path))


def test_refuses_an_unreachable_hub_id_in_one_sentence(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def offline(name, **_):
        raise OSError(f"We couldn't connect to the hub for {name}\nCheck your connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    refuses("--bert_path bert-base-uncased: neither a local folder", "bert-base-uncased")


def test_hub_tokenizer_gives_its_vocabulary(monkeypatch, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    found = transformers.BertTokenizerFast.from_pretrained(str(tmp_path))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: found)
    assert load_tokenizer("some/bert").tokens == TOKENS


# --- whole words -------------------------------------------------------------------------------

CAPTIONS = ["A man's T-shirt is white-walled.", "The man isn't Mrs. Smith. He runs!"]


def test_captions_are_split_as_nltk_splits_them():
    assert caption_words(CAPTIONS[0]) == "a man 's t-shirt is white-walled .".split()
    assert caption_words(CAPTIONS[1]) == "the man is n't mrs. smith . he runs !".split()


def test_words_seen_often_enough_are_learnt_in_a_fixed_order():
    words = learn_words([*CAPTIONS, "a man, a hat"], fewest=2)
    assert words == ["<pad>", "<start>", "<end>", "<unk>", "a", "man", ".", "is"]
    assert learn_words([], fewest=2) == words[:4]


def test_whole_words_become_ids_between_start_and_end():
    tokenizer = CaptionTokenizer(learn_words([*CAPTIONS, "a man, a hat"], fewest=2))
    assert tokenizer.encode("A man is tall.", 90) == [1, 4, 5, 7, 3, 6, 2]
    assert tokenizer.encode("A man is tall.", 4) == [1, 4, 5, 2]
    assert tokenizer.encode_words("A man is tall.", 4) == [[4], [5]]
    assert tokenizer.pad_id == 0


def test_whole_words_are_augmented_like_pieces():
    tokenizer = CaptionTokenizer(learn_words([*CAPTIONS, "a man, a hat"], fewest=2))
    rng = np.random.default_rng(0)
    words = [[4]] * 20_000
    ids = tokenizer.augment(words, rng)[1:-1]
    assert ids.count(3) / 20_000 == pytest.approx(0.1, abs=0.01)  # masked: <unk>
    assert 1 - len(ids) / 20_000 == pytest.approx(0.08, abs=0.01)  # deleted
    assert set(ids) <= {3, 4, 5, 6, 7}


def test_a_saved_vocabulary_tells_which_tokenizer_it_is_of(tmp_path):
    words = learn_words([*CAPTIONS, "a man, a hat"], fewest=1)
    CaptionTokenizer(words).save(tmp_path)
    loaded = load_tokenizer("tiny", vocab_file=tmp_path / "vocab.txt")
    assert isinstance(loaded, CaptionTokenizer)
    assert loaded.tokens == words
    assert isinstance(checkpoint_tokenizer({"vocabulary": words}, "tiny"), CaptionTokenizer)
    pieces = checkpoint_tokenizer({"vocabulary": learn_vocabulary(CAPTIONS)}, "tiny")
    assert not isinstance(pieces, CaptionTokenizer)


def test_missing_nltk_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(InputError, match="NLTK, which is not installed: pip install"):
        caption_words("a man")
