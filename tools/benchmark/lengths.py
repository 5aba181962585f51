"""Lengths of real captions and dense texts in word pieces, as numbers to draw from.

Counted with the house's WordTokenizer and bert-base-uncased's vocabulary, [CLS] and [SEP] included
and nothing cut, on the test captions of Flickr30K (5,000) and COCO 5K (25,000), and on the dense
texts of the same images (1,000 and 5,000, LLaVA's, as released with SEPS). With those files in
data/f30k and data/coco:

    python -m tools.benchmark lengths data/f30k/test_caps.txt data/coco/testall_caps.txt
    python -m tools.benchmark lengths data/f30k/f30k_test.jsonl data/coco/coco_testall.jsonl

Mean length of a caption 14.2, of a dense text 116.8.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path
from typing import Any

from lib.data.dense_texts import parse_dense
from lib.errors import InputError
from lib.files import text_lines
from vocab import load_tokenizer

LONGEST = 90  # where --max_word cuts captions, and, left at 0, --max_dense_word dense texts
NO_LIMIT = 10**9

# the shortest length, then how many texts have that length, one more, two more, …
CAPTION_COUNTS = (
    4,
    """2 1 8 25 96 290 1212 3537 5005 5225 4342 3134 2176 1453 955 631 468 307 244 158 128 129 85 64
    60 42 41 33 22 17 20 15 8 5 8 7 9 3 2 4 3 4 2 1 4 3 0 0 2 0 2 1 0 0 2 1 0 2 0 1 0 0 0 0 0 0 0 0
    0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1""",
)
DENSE_COUNTS = (
    64,
    """1 2 0 1 1 1 1 0 0 3 2 8 5 8 6 8 5 11 16 21 14 14 14 16 26 30 39 34 58 50 56 63 63 84 73 69 83
    99 109 99 115 118 127 109 121 138 97 154 140 126 147 149 157 146 138 154 150 131 123 150 110
    126 141 158 110 117 125 112 137 126 104 131 104 86 79 57 72 52 42 30 25 18 16 7 3 3 3 4 3 2 1 2
    0 2 4 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1""",
)


def histogram(kind: str) -> dict[int, int]:
    """Return how many texts have each length; `kind` is "caption" or "dense"."""
    first, counts = {"caption": CAPTION_COUNTS, "dense": DENSE_COUNTS}[kind]
    return {first + k: int(count) for k, count in enumerate(counts.split())}


def draw_lengths(kind: str, count: int, seed: int, longest: int = LONGEST) -> list[int]:
    """Return `count` lengths drawn from the histogram of `kind` ("caption" or "dense").

    Longer ones are cut to `longest`, as the loader cuts texts. The same seed draws the same.
    """
    known = histogram(kind)
    drawn = random.Random(seed).choices(list(known), weights=list(known.values()), k=count)
    return [min(length, longest) for length in drawn]


# --- counting -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command that counts lengths."""
    parser.add_argument("files", nargs="+", help="captions a line each, or .jsonl with a text each")
    parser.add_argument("--bert_path", default="bert-base-uncased", help="whose vocabulary counts")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row: the lengths of all texts of the files together, in the form kept above."""
    tokenizer = load_tokenizer(args.bert_path)
    texts = [text for file in args.files for text in read_texts(Path(file))]
    counts = Counter(len(tokenizer.encode(text, NO_LIMIT)) for text in texts)
    first, last = min(counts), max(counts)
    mean = sum(length * count for length, count in counts.items()) / len(texts)
    numbers = " ".join(str(counts[one]) for one in range(first, last + 1))
    return [
        {
            "name": f"{len(texts)} texts",
            "mean": mean,
            "first": first,
            "counts": numbers,
            "note": f"mean length {mean:.1f}; counts from length {first} on: {numbers}",
        }
    ]


def read_texts(path: Path) -> list[str]:
    """Return the texts of a caption file or of a .jsonl file. Raises InputError with the line."""
    hint = "give a file with captions or dense texts"
    lines = [line.strip() for line in text_lines(path, hint)]
    if path.suffix != ".jsonl":
        texts = [line for line in lines if line]
    else:
        records = (parse_dense(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line)
        texts = [record["text"].strip() for record in records]
    if not texts:
        raise InputError(f"{path} is empty; {hint}")
    return texts
