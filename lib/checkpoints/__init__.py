"""Models on disk: `load_model` reads our own checkpoints and the official ones."""

from lib.checkpoints.checkpoint import load_model

__all__ = ["load_model"]
