"""Dense texts of a shard's pictures, as they were read: a JSON string a line, in row order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError

NAME = "dense.jsonl"


def write_texts(shard: Path, texts: Sequence[str]) -> None:
    """Write the texts of all rows of a shard."""
    lines = "".join(json.dumps(one) + "\n" for one in texts)
    (shard / NAME).write_text(lines, encoding="utf-8")


def read_texts(shard: Path, rows: Sequence[int]) -> list[str] | None:
    """Return the texts of some rows, None where the shard keeps none; InputError if damaged."""
    path = shard / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(lines[row]) for row in rows]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} can't be read ({error}); remove its folder and index again"
        ) from None
