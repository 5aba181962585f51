"""Evaluation protocols: what a query carried beside itself, told by what it was handed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

PROTOCOLS = {  # SPEC 8, in the order they are shown
    "none": "captions and pixels alone",
    "image": "a query or gallery image carries its own dense text",
    "oracle": "a caption query carries the dense text of its own answer",
}
ORACLE_LINE = "oracle: queries carried text made from their own answers; not comparable"
FEWEST_WORDS = 5  # of a caption that is no longer found in a dense text by chance
REPEATED_SHARE = 0.05  # real descriptions: 0.1 % of Flickr30K's, 0.3 % of COCO's test images


def protocol_of(images_carried: bool, captions_carried: bool, repeated_share: float = 0.0) -> str:
    """Return the protocol of a result by what its batches carried, whatever the flags were called.

    `repeated_share`: of images whose dense text repeats one of their captions, as
    `repeated_captions` counts; above `REPEATED_SHARE` the texts were made from the captions, which
    are the answers to an image's query.
    """
    if captions_carried or (images_carried and repeated_share > REPEATED_SHARE):
        return "oracle"
    return "image" if images_carried else "none"


def strictest(protocols: Sequence[str]) -> str:
    """Return the protocol of a result made of several: that of the member told most."""
    return max(protocols, key=list(PROTOCOLS).index)


def repeated_captions(
    dense: Sequence[str] | None, captions: Sequence[str], caption_images: np.ndarray
) -> float:
    """Return the share of images whose dense text holds one of their captions word for word.

    dense: one text an image, None where they are not read. Case and punctuation do not count, nor
    do captions of fewer than `FEWEST_WORDS` words.
    """
    if dense is None:
        return 0.0
    texts = [f" {_words(text)} " for text in dense]
    found = {
        int(image)
        for caption, image in zip(map(_words, captions), caption_images, strict=True)
        if caption.count(" ") >= FEWEST_WORDS - 1 and f" {caption} " in texts[image]
    }
    return len(found) / max(1, len(texts))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
