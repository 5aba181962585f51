"""Caption string -> word ids: BERT's lower-cased WordPiece, learnt words, or a model's own."""

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

from lib.data.model_tokenizer import ModelTokenizer
from lib.data.word_augment import WordAugment
from lib.errors import InputError, as_input_error
from lib.files import check_folder, load_object, read_json, read_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILES = (  # one of them is in every folder that holds a tokenizer
    "vocab.txt",
    "tokenizer.json",
    "vocab.json",
    "spm.model",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
CAPTION_TOKENS = ("<pad>", "<start>", "<end>", "<unk>")  # ids 0 to 3 of a learnt word list
FEWEST_TIMES = 4  # that a word occurs, to be in that list
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bmr\.)(?<!\bmrs\.)(?<!\bdr\.)(?<!\bst\.)\s+")


class WordTokenizer(WordAugment):
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
        self.ordinary = np.setdiff1d(np.arange(len(self.tokens)), special)

    longest: int | None = None  # the encoder's positions are the only limit

    @property
    def prefix(self) -> list[int]:
        """[CLS], which stands before a caption."""
        return [self.cls_id]

    @property
    def suffix(self) -> list[int]:
        """[SEP], which stands behind a caption."""
        return [self.sep_id]

    @property
    def vocabulary(self) -> list[str]:
        """What `tokenizer_of` rebuilds the tokenizer from: the tokens in the order of their ids."""
        return self.tokens

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

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `vocab.txt`, which `load_tokenizer` reads back, into `folder`; return its path."""
        path = Path(folder) / "vocab.txt"
        path.write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")
        return path


class CaptionTokenizer(WordTokenizer):
    """Whole words, lower-cased, over a list learnt from captions: what the GRU encoder reads.

    A caption is <start> … <end>; a word that is not in the list, or that augmentation masks, is
    <unk>.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = range(len(CAPTION_TOKENS))
        self.ordinary = np.arange(len(CAPTION_TOKENS), len(self.tokens))

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


def load_tokenizer(
    bert_path: str, vocab_file: str | os.PathLike | None = None
) -> WordTokenizer | ModelTokenizer:
    """Return the tokenizer of `--bert_path`: a local folder or a hub id.

    Uncased BERT's WordPiece is run by `WordTokenizer`, which gives the LAPS family's ids; any other
    model's is its own. `vocab_file`, the vocab.txt of a run folder, goes before `bert_path`. Raises
    InputError where no tokenizer can be read.
    """
    if vocab_file is not None:
        return tokenizer_of(_read_vocab_txt(Path(vocab_file)), str(vocab_file))
    if bert_path == "tiny":
        raise InputError(
            "--bert_path tiny learns its vocabulary when it is trained and keeps it as vocab.txt "
            "in the run folder; there is none here"
        )
    folder = Path(bert_path).expanduser()
    if not folder.exists() and bert_path[:1] not in (".", "/", "~"):
        return _hub_tokenizer(bert_path)
    if _has_own_tokenizer(folder, bert_path):
        return ModelTokenizer.of_model(str(folder))
    return WordTokenizer(_local_tokens(folder, bert_path), f"--bert_path {bert_path}")


def checkpoint_tokenizer(payload: dict[str, Any], bert_path: str) -> WordTokenizer | ModelTokenizer:
    """Return the tokenizer of a checkpoint: its own vocabulary, or that of `bert_path`."""
    words = payload.get("vocabulary")
    return load_tokenizer(bert_path) if words is None else tokenizer_of(words, "the checkpoint")


def tokenizer_of(
    tokens: Sequence[str] | dict[str, Any], source: str = "vocabulary"
) -> WordTokenizer | ModelTokenizer:
    """Return the tokenizer of a saved vocabulary: whole words, BERT's pieces, or a model's own."""
    if isinstance(tokens, dict):
        return ModelTokenizer(tokens, source)
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
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _has_own_tokenizer(folder: Path, bert_path: str) -> bool:
    """Return whether a local folder holds another tokenizer than uncased BERT's.

    Raises InputError where it holds none, or one that can't be read.
    """
    check_folder(os.path.expanduser(bert_path), "--bert_path")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"--bert_path {bert_path}: the folder holds neither vocab.txt nor tokenizer.json; "
            "copy the text encoder's tokenizer files into it"
        )
    path = folder / "tokenizer.json"
    if path.is_file():
        found = load_object(path)
        with as_input_error(f"{path}: the tokenizer can't be read"):
            return not is_uncased_wordpiece(found)
    if not (folder / "vocab.txt").is_file():
        return True
    cased = read_json(folder / "tokenizer_config.json").get("do_lower_case") is False
    return cased or "<s>" in _read_vocab_txt(folder / "vocab.txt")  # as MPNet's


def is_uncased_wordpiece(pipeline: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is uncased BERT's: its pieces and its lower-casing."""
    normalizer = pipeline.get("normalizer") or {"lowercase": True}
    vocabulary = pipeline["model"].get("vocab", {})
    wordpiece = pipeline["model"].get("type") == "WordPiece"
    return wordpiece and normalizer.get("lowercase", False) and "<s>" not in vocabulary


def _local_tokens(folder: Path, bert_path: str) -> list[str]:
    if (folder / "vocab.txt").is_file():
        return _read_vocab_txt(folder / "vocab.txt")
    path = folder / "tokenizer.json"
    with as_input_error(f"{path}: the tokenizer can't be read"):
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    return _in_id_order(vocabulary, str(path))


def _hub_tokenizer(bert_path: str) -> WordTokenizer | ModelTokenizer:
    own = ModelTokenizer.of_model(bert_path)
    if not is_uncased_wordpiece(json.loads(own.vocabulary["tokenizer"])):
        return own
    return WordTokenizer(own.tokens, f"--bert_path {bert_path}")


def _in_id_order(vocabulary: dict[str, int], source: str) -> list[str]:
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise InputError(f"{source}: the vocabulary's ids have gaps or repeat")
    return tokens
