"""What a method says before it is built: the flags it reads, what they ask of the data."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

DENSE_WORDS = 256  # the real dense texts have a median of about 130 word pieces


class MethodOptions:
    """What a method's class says of parsed flags; every answer has a default."""

    name: ClassVar[str]
    has_global_embedding: ClassVar[bool] = True  # one that images and captions share
    accepts_regions: ClassVar[bool] = False  # takes precomputed regions in the place of pixels
    takes_features: ClassVar[bool] = True  # reads the image encoder's last hidden state alone
    also_reads: ClassVar[tuple[str, ...]] = ()  # flags beside its own that not every method reads
    uses_pixels: ClassVar[bool] = True

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        """Add the flags that this method alone reads."""

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        """Raise InputError where flags contradict each other; called before anything is loaded."""

    @classmethod
    def defaults(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Return what this method's flags change in the defaults; a flag given still wins."""
        return {}

    @classmethod
    def wants_dense(cls, args: argparse.Namespace) -> str | None:
        """Return who is given the dense text under `args`: "image", "caption" or None."""
        return None

    @classmethod
    def trains_on_dense(cls, args: argparse.Namespace) -> bool:
        """Return whether training batches carry dense texts, whoever carries them in evaluation."""
        return cls.wants_dense(args) is not None

    @classmethod
    def pairs_from_dense(cls, args: argparse.Namespace) -> bool:
        """Return whether training pairs are images and their dense texts, without captions."""
        return False

    @classmethod
    def dense_words(cls, args: argparse.Namespace, training: bool = True) -> int:
        """Return how many word pieces of a dense text are read, in training or in evaluation."""
        if args.max_dense_word is None:
            return DENSE_WORDS
        return args.max_dense_word or args.max_word

    @classmethod
    def starts_from(cls, args: argparse.Namespace) -> str | None:
        """Return the checkpoint that a new run takes its first weights from, None without."""
        return None
