"""Captions with some of their whole words masked, replaced or deleted, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AUGMENT_RATE = 0.2  # chance that a word is masked, replaced or deleted
MASK_SHARE, RANDOM_SHARE = 0.5, 0.1  # of the chosen words; the rest are deleted


class WordAugment:
    """What tokenizers share: `augment`, from ids grouped by whole word.

    `prefix` and `suffix` are the special tokens around a caption, `ordinary` the ids (N,) that
    random words are drawn from; a vocabulary without a mask token has `mask_id` None, and what
    would be masked is deleted.
    """

    prefix: Sequence[int]
    suffix: Sequence[int]
    ordinary: np.ndarray
    mask_id: int | None

    def augment(self, words: Sequence[Sequence[int]], rng: np.random.Generator) -> list[int]:
        """Return the ids, special tokens included, of a caption with some whole words changed.

        Each word is chosen with probability 0.2; of the chosen, half become [MASK] and a tenth
        random ordinary tokens (one for each sub-token), the rest are deleted. A caption that would
        lose all its words stays as it is.
        """
        kept: list[int] = []
        for word in words:
            kept.extend(self._augment_word(word, rng))
        if not kept:
            kept = [token for word in words for token in word]
        return [*self.prefix, *kept, *self.suffix]

    def _augment_word(self, word: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
        draw = rng.random() / AUGMENT_RATE  # uniform in [0, 1) for the words that are chosen
        if draw >= 1:
            return word
        if draw < MASK_SHARE:
            return [] if self.mask_id is None else [self.mask_id] * len(word)
        if draw < MASK_SHARE + RANDOM_SHARE and len(self.ordinary):
            return rng.choice(self.ordinary, size=len(word)).tolist()
        return []
