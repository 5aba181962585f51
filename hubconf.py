"""torch.hub.load(repo, "load", checkpoint="FOLDER, FILE or OWNER/NAME"): a model that is ready."""

from __future__ import annotations

from typing import Any

dependencies = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "cv2"]


def load(checkpoint: str, **options: Any) -> Any:
    """Return (model in evaluation mode, its arguments); `options` as lib.checkpoints.load_model."""
    from lib.checkpoints import load_model

    return load_model(checkpoint, **options)
