"""What a model saw in an image for a caption: patches kept, why, and which fits which word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import normalize

from lib.batch import Batch, Tokens
from lib.methods.base import Method

SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Evidence:
    """One image and one caption; maps over patches are (L,), row by row of the grid."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, of any size: what the encoder reads, stretched
    caption: str
    method: str
    similarity: float
    grid: tuple[int, int] | None = None  # None where the method matches no patches
    kept: dict[str, np.ndarray] = field(default_factory=dict)  # bool, by branch
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    cosines: np.ndarray | None = None  # (words, L) of each word with each patch

    @property
    def note(self) -> str:
        """Return what the picture can't show, and why; empty where it shows everything."""
        if self.grid is None:
            return f"{self.method} compares one vector an image: no patch is matched with a word"
        if not self.kept:
            return f"{self.method} chooses no patches: all take part"
        return ""

    def best(self, word: int, count: int = 3) -> np.ndarray:
        """Return the patches that fit a word best, among the kept ones where any are dropped."""
        values = self.cosines[word].copy()
        if self.kept:
            values[~np.any(list(self.kept.values()), axis=0)] = -np.inf
        return np.argsort(-values, kind="stable")[:count]


@torch.inference_mode()
def gather_evidence(
    model: Method,
    image: Batch,
    captions: Batch,
    picture: np.ndarray,
    texts: Sequence[str],
    words: Sequence[Sequence[str]],
) -> list[Evidence]:
    """Return the evidence of one image with each of some captions.

    `picture` is what to draw on; `words` are each caption's word pieces as the model reads them.
    """
    tokens, encoded = model.encode_image_batch(image), model.encode_text_batch(captions)
    scores = model.similarity(tokens, encoded)[0].tolist()
    plain = {"image": picture, "method": model.name}
    if tokens.local.shape[1] == 1 or encoded.local.shape[1] == 1:
        return [
            Evidence(caption=t, similarity=s, **plain) for t, s in zip(texts, scores, strict=True)
        ]
    choice = model.patch_choice(tokens, encoded)
    kept = {} if choice is None else _numpy(choice.kept)
    maps = {} if choice is None else _numpy(choice.scores)
    cosines = _cosines(tokens, encoded)
    found = []
    for row, text in enumerate(texts):
        real = [n for n, one in enumerate(words[row]) if one not in SPECIAL]
        found.append(
            Evidence(
                caption=text,
                similarity=scores[row],
                grid=patch_grid(model, tokens.local.shape[1]),
                kept={name: one[row] for name, one in kept.items()},
                scores={name: one[row] for name, one in maps.items()},
                words=tuple(words[row][n] for n in real),
                cosines=cosines[row, real],
                **plain,
            )
        )
    return found


def patch_grid(model: Method, patches: int) -> tuple[int, int]:
    """Return (rows, columns) of a model's patches; regions, which lie anywhere, in one row."""
    return getattr(model.image_encoder, "grid", (1, patches))


def _cosines(images: Tokens, texts: Tokens) -> np.ndarray:
    """Return the cosines of every word with every patch of the one image, (T, M, L)."""
    patches, words = normalize(images.local[0], dim=-1), normalize(texts.local, dim=-1)
    return (words @ patches.T).float().cpu().numpy()


def _numpy(maps: dict) -> dict[str, np.ndarray]:
    return {name: one[0].cpu().numpy() for name, one in maps.items()}  # (T, L)
