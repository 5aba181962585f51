"""Image files as models want them: RGB, turned upright, no larger than asked."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from lib.data.extras import need

JPEG_QUALITY = 90


def open_resized(path: Path, longest: int) -> Any:
    """Return a PIL RGB image whose sides are at most `longest` pixels. Raises OSError, ValueError.

    Smaller images stay as they are; the camera's orientation is applied.
    """
    pil = need("PIL.Image", "pillow", "tools.describe")
    turn = need("PIL.ImageOps", "pillow", "tools.describe")
    try:
        with pil.open(path) as image:
            image.draft("RGB", (longest, longest))
            upright = turn.exif_transpose(image).convert("RGB")
    except pil.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    upright.thumbnail((longest, longest), pil.Resampling.BICUBIC)
    return upright


def data_url(path: Path, longest: int) -> str:
    """Return a resized image as a data: URL of JPEG bytes. Raises OSError, ValueError."""
    buffer = io.BytesIO()
    open_resized(path, longest).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
