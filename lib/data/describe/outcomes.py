"""What a backend is asked and what it answers: an image's text, or why there is none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# NOTE: the sentence that the SEPS paper gives to LLaVA; sampling below is the paper's too.
PROMPT = "Provide a comprehensive description of this image."
DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"  # of the transformers backend
REFUSAL = re.compile(
    r"^(i['’]?m (very )?sorry|sorry[,.]|i am sorry|i apologi[sz]e|as an ai|"
    r"i (can['’]?t|cannot|can not|am unable|['’]m unable|won['’]t)\b|i['’]m (unable|not able)|"
    r"unable to (view|describe|process|provide|see)|no image (was|has been|is) )",
    flags=re.IGNORECASE,
)


@dataclass(frozen=True)
class Task:
    """An image to be described; `name` is its path in the image folder."""

    image_id: str
    name: str
    path: Path


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn; the defaults are the SEPS paper's."""

    prompt: str = PROMPT
    temperature: float = 0.2
    top_p: float = 0.9
    max_new_tokens: int = 500
    image_size: int = 672  # longest side of what is sent, in pixels

    @property
    def prompt_sha(self) -> str:
        """First 16 hexadecimal digits of the prompt's SHA-256."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """A text, or why there is none; `broken` where server or model failed, not one image.

    `cut` tells a text that ended because max_new_tokens were used up.
    """

    text: str | None = None
    reason: str | None = None
    broken: bool = False
    cut: bool = False


Emit = Callable[[Task, Outcome], None]


class Backend(Protocol):
    """A model that describes images; `name` goes into each line."""

    name: str

    def describe(self, tasks: Iterable[Task], emit: Emit) -> None:
        """Call `emit` with each task's outcome, in any order; what `emit` raises ends it."""


def judge(text: str | None, cut: bool = False, refusal: str | None = None) -> Outcome:
    """Return the outcome of what a model said: refusals and empty texts are failures."""
    plain = (text or "").strip()
    if refusal:
        return Outcome(reason=f"refused: {refusal.strip():.120}")
    if not plain:
        return Outcome(reason="empty text")
    if REFUSAL.match(plain):
        return Outcome(reason=f"refused: {plain:.120}")
    return Outcome(text=plain, cut=cut)
