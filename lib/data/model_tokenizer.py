"""A text encoder's own tokenizer: lower-casing, special tokens and length, kept as plain data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Encoding, Tokenizer

from lib.data.word_augment import WordAugment
from lib.errors import InputError

ENDLESS = 10**6  # a model_max_length beyond it says that there is none


class ModelTokenizer(WordAugment):
    """Any fast tokenizer of transformers, run by the library `tokenizers` from its JSON alone.

    `vocabulary` is that JSON with the few ids that it does not tell, plain data that a checkpoint
    keeps; `of_model` reads it off a folder or hub id. Raises InputError where it can't be read.
    """

    def __init__(self, vocabulary: dict[str, Any], source: str = "the checkpoint") -> None:
        self.vocabulary = vocabulary
        try:
            self._tokenizer = Tokenizer.from_str(vocabulary["tokenizer"])
            self.pad_id, self.mask_id = int(vocabulary["pad"]), vocabulary["mask"]
            self.longest, special = vocabulary["longest"], vocabulary["special"]
        except Exception as error:  # tokenizers raises bare Exception for a malformed text
            raise InputError(f"{source}: the tokenizer can't be read ({error!r:.160})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.prefix, self.suffix = self._around()
        self.ordinary = np.setdiff1d(np.arange(self.vocab_size), special)

    @staticmethod
    def of_model(source: str) -> ModelTokenizer:
        """Return the tokenizer in a folder or of a hub id."""
        from transformers import AutoTokenizer  # slow to import, and only needed here

        try:
            found = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # each kind of tokenizer has its own errors for a missing file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"--bert_path {source}: neither a local folder with a tokenizer nor a model that "
                f"the hub hands out here; give such a folder, or tiny ({reason:.160})"
            ) from None
        return ModelTokenizer(plain_tokenizer(found, source), f"--bert_path {source}")

    @property
    def vocab_size(self) -> int:
        """Number of word ids."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def tokens(self) -> list[str]:
        """The tokens in the order of their ids."""
        tokens = (self._tokenizer.id_to_token(index) for index in range(self.vocab_size))
        return cast("list[str]", list(tokens))  # an id without a token is beyond the size

    def encode(self, text: str, max_word: int) -> list[int]:
        """Return the ids with special tokens, at most `max_word`; a cut keeps the closing ones."""
        return [*self.prefix, *self._cut(text, max_word).ids, *self.suffix]

    def encode_words(self, text: str, max_word: int) -> list[list[int]]:
        """Return the ids that `encode` puts between the special tokens, grouped by whole word.

        A word is what the tokenizer's first split calls one, and ends at white space at the latest
        (some tokenizers do not split there).
        """
        encoding = self._cut(text, max_word)
        words: list[list[int]] = []
        previous, ended = None, 0
        rows = zip(encoding.ids, encoding.word_ids, encoding.offsets, strict=True)
        for token, word, (_, end) in rows:
            gap = text[ended:end]  # the white space before a token may be part of it
            if words and word == previous and not gap[:1].isspace():
                words[-1].append(token)
            else:
                words.append([token])
            previous, ended = word, max(ended, end)
        return words

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `tokenizer.json` into `folder`; return its path."""
        path = Path(folder) / "tokenizer.json"
        path.write_text(self.vocabulary["tokenizer"], encoding="utf-8")
        return path

    def _cut(self, text: str, max_word: int) -> Encoding:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        encoding.truncate(max(1, max_word - len(self.prefix) - len(self.suffix)))
        return encoding

    def _around(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and behind a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for first in range(len(whole) - len(plain) + 1):
            if whole[first : first + len(plain)] == plain:
                return whole[:first], whole[first + len(plain) :]
        raise InputError("--bert_path: the tokenizer's special tokens do not stand around the text")


def plain_tokenizer(found: Any, source: str) -> dict[str, Any]:
    """Return the plain data of a transformers tokenizer. Raises InputError for one in Python."""
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(
            f"--bert_path {source}: {type(found).__name__} runs in Python in this transformers; "
            "a tokenizer.json is needed: add one, or update transformers"
        )
    pad = found.pad_token_id
    return {
        "tokenizer": backend.to_str(),
        "pad": 0 if pad is None else pad,
        "mask": found.mask_token_id,
        "special": sorted(set(found.all_special_ids)),
        "longest": found.model_max_length if found.model_max_length < ENDLESS else None,
    }
