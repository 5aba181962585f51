"""Caption string -> word ids: BERT's lower-cased WordPiece, with its or a learnt vocabulary."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from lib.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CAPTION_TOKENS = ("<pad>", "<start>", "<end>", "<unk>")  # ids 0 to 3 of a learnt word list
FEWEST_TIMES = 4  # that a word occurs, to be in that list
AUGMENT_RATE = 0.2  # chance that a word is masked, replaced or deleted
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bmr\.)(?<!\bmrs\.)(?<!\bdr\.)(?<!\bst\.)\s+")
MASK_SHARE, RANDOM_SHARE = 0.5, 0.1  # of the chosen words; the rest are deleted


class WordTokenizer:
    """BERT's uncased WordPiece over `tokens`, the vocabulary in id order.

    The pipeline is built here whatever the vocabulary came from, so that the ids depend neither on
    the version of transformers nor on settings (truncation, padding) stored beside a vocabulary.
    Raises InputError where the five special tokens are not all in the vocabulary.
    """

    def __init__(self, tokens: Sequence[str], source: str = "vocabulary") -> None:
        self.tokens = list(tokens)
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise InputError(f"{source}: no BERT vocabulary, it lacks {', '.join(missing)}")
        self._wordpiece = BertWordPieceTokenizer(vocabulary, lowercase=True)
        self.pad_id, _, self.cls_id, self.sep_id, self.mask_id = (
            vocabulary[token] for token in SPECIAL_TOKENS
        )
        special = [vocabulary[token] for token in SPECIAL_TOKENS]
        self._ordinary = np.setdiff1d(np.arange(len(self.tokens)), special)

    @property
    def vocab_size(self) -> int:
        """Number of word ids."""
        return len(self.tokens)

    def encode(self, text: str, max_word: int) -> list[int]:
        """Return the ids [CLS] … [SEP], at most `max_word` of them; a cut keeps [SEP]."""
        ids = self._wordpiece.encode(text, add_special_tokens=False).ids
        return [self.cls_id, *ids[: max_word - 2], self.sep_id]

    def encode_words(self, text: str, max_word: int) -> list[list[int]]:
        """Return the ids that `encode` puts between [CLS] and [SEP], grouped by whole word.

        A word is what BERT's basic tokenizer calls one: a punctuation mark is a word of its own.
        """
        encoding = self._wordpiece.encode(text, add_special_tokens=False)
        words: list[list[int]] = []
        previous = None
        pairs = zip(encoding.ids, encoding.word_ids, strict=True)
        for _, (token, word) in zip(range(max_word - 2), pairs, strict=False):
            if word is not None and word == previous:
                words[-1].append(token)
            else:
                words.append([token])
            previous = word
        return words

    def augment(self, words: Sequence[Sequence[int]], rng: np.random.Generator) -> list[int]:
        """Return the ids [CLS] … [SEP] of a caption with some of its whole words changed.

        Each word is chosen with probability 0.2; of the chosen, half become [MASK] and a tenth
        random ordinary tokens (one for each sub-token), the rest are deleted. A caption that would
        lose all its words stays as it is.
        """
        kept: list[int] = []
        for word in words:
            kept.extend(self._augment_word(word, rng))
        if not kept:
            kept = [token for word in words for token in word]
        return [self.cls_id, *kept, self.sep_id]

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `vocab.txt`, which `load_tokenizer` reads back, into `folder`; return its path."""
        path = Path(folder) / "vocab.txt"
        path.write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")
        return path

    def _augment_word(self, word: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
        draw = rng.random() / AUGMENT_RATE  # uniform in [0, 1) for the words that are chosen
        if draw >= 1:
            return word
        if draw < MASK_SHARE:
            return [self.mask_id] * len(word)
        if draw < MASK_SHARE + RANDOM_SHARE and len(self._ordinary):
            return rng.choice(self._ordinary, size=len(word)).tolist()
        return []


class CaptionTokenizer(WordTokenizer):
    """Whole words, lower-cased, over a list learnt from captions: what the GRU encoder reads.

    A caption is <start> … <end>; a word that is not in the list, or that augmentation masks, is
    <unk>.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = range(len(CAPTION_TOKENS))
        self._ordinary = np.arange(len(CAPTION_TOKENS), len(self.tokens))

    def encode(self, text: str, max_word: int) -> list[int]:
        """Return the ids <start> … <end>, at most `max_word` of them; a cut keeps <end>."""
        words = self.encode_words(text, max_word)
        return [self.cls_id, *(word for (word,) in words), self.sep_id]

    def encode_words(self, text: str, max_word: int) -> list[list[int]]:
        """Return the ids that `encode` puts between <start> and <end>, each in a list."""
        return [[self._ids.get(word, self.mask_id)] for word in caption_words(text)[: max_word - 2]]


def caption_words(text: str) -> list[str]:
    """Return the lower-cased words and punctuation marks of a caption, as NLTK splits them.

    NOTE: word_tokenize finds sentences with a trained model, which has to be downloaded; here the
    text is cut behind full stops, marks and blanks. Raises InputError where NLTK is missing.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:
        raise InputError(
            "--text_encoder gru splits captions with NLTK, which is not installed: "
            "pip install -r requirements-extra.txt"
        ) from None
    split = NLTKWordTokenizer().tokenize
    return [word for part in SENTENCE_END.split(text.lower()) for word in split(part)]


def learn_words(captions: Iterable[str], fewest: int = FEWEST_TIMES) -> list[str]:
    """Return <pad>, <start>, <end>, <unk>, then the words that occur `fewest` times or more.

    The most frequent word comes first; the same captions give the same list, always.
    """
    counts = Counter(word for caption in captions for word in caption_words(caption))
    return [*CAPTION_TOKENS, *(word for word in _frequent(counts) if counts[word] >= fewest)]


def load_tokenizer(bert_path: str, vocab_file: str | os.PathLike | None = None) -> WordTokenizer:
    """Return the tokenizer of `--bert_path`: a local folder or a hub id.

    `vocab_file`, the vocab.txt of a run folder, goes before `bert_path`. Raises InputError where no
    BERT vocabulary can be read.
    """
    if vocab_file is not None:
        return tokenizer_of(_read_vocab_txt(Path(vocab_file)), str(vocab_file))
    if bert_path == "tiny":
        raise InputError(
            "--bert_path tiny learns its vocabulary when it is trained and keeps it as vocab.txt "
            "in the run folder; there is none here"
        )
    folder = Path(bert_path).expanduser()
    if folder.exists() or bert_path[:1] in (".", "/", "~"):
        return WordTokenizer(_local_tokens(folder, bert_path), f"--bert_path {bert_path}")
    return WordTokenizer(_hub_tokens(bert_path), f"--bert_path {bert_path}")


def checkpoint_tokenizer(payload: dict[str, Any], bert_path: str) -> WordTokenizer:
    """Return the tokenizer of a checkpoint: its own vocabulary, or that of `bert_path`."""
    words = payload.get("vocabulary")
    return load_tokenizer(bert_path) if words is None else tokenizer_of(words, "the checkpoint")


def tokenizer_of(tokens: Sequence[str], source: str = "vocabulary") -> WordTokenizer:
    """Return the tokenizer that a saved vocabulary belongs to: whole words, or BERT's pieces."""
    whole_words = tuple(tokens[: len(CAPTION_TOKENS)]) == CAPTION_TOKENS
    return CaptionTokenizer(tokens) if whole_words else WordTokenizer(tokens, source)


def learn_vocabulary(lines: Iterable[str], size: int = 8000) -> list[str]:
    """Return at most `size` tokens learnt from caption lines, for `--bert_path tiny`.

    First the special tokens (ids 0 to 4), then every character as a word's start and as its
    continuation (## form), so that any word of known characters can be spelled, then whole words;
    the most frequent first. The same lines give the same tokens, always.

    NOTE: the trainer in `tokenizers` numbers its tokens differently on each run (it iterates over
    a hash map), so a run could not be repeated with it.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for line in lines:
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(line))
        words.update(word for word, _ in pieces)
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    spelling = [form for one in _frequent(characters) for form in (one, f"##{one}")]
    learnt = dict.fromkeys((*SPECIAL_TOKENS, *spelling, *_frequent(words)))
    return list(learnt)[:size]


def _frequent(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda token: (-counts[token], token))


def _read_vocab_txt(path: Path) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the vocabulary can't be read ({error})") from None


def _local_tokens(folder: Path, bert_path: str) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"--bert_path {bert_path}: no such folder")
    if (folder / "vocab.txt").is_file():
        return _read_vocab_txt(folder / "vocab.txt")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"--bert_path {bert_path}: the folder holds neither vocab.txt nor tokenizer.json; "
            "copy BERT's vocab.txt into it"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model"]["type"]
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise InputError(f"{path}: the tokenizer can't be read ({error!r:.160})") from None
    if kind != "WordPiece":
        raise InputError(f"{path}: a {kind} tokenizer, but BERT's WordPiece is needed")
    return _in_id_order(vocabulary, str(path))


def _hub_tokens(bert_path: str) -> list[str]:
    from transformers import AutoTokenizer  # slow to import, and only needed here

    try:
        tokenizer = AutoTokenizer.from_pretrained(bert_path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--bert_path {bert_path}: neither a local folder nor a model that the hub hands out "
            f"here; give a local folder with BERT's vocab.txt, or tiny ({reason:.160})"
        ) from None
    return _in_id_order(tokenizer.get_vocab(), f"--bert_path {bert_path}")


def _in_id_order(vocabulary: dict[str, int], source: str) -> list[str]:
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise InputError(f"{source}: the vocabulary's ids have gaps or repeat")
    return tokens
