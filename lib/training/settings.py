"""How long, how often and how carefully to train."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from lib.training.logs import entries_apart


@dataclass
class Settings:
    """The flags of the same names."""

    num_epochs: int = 30
    grad_clip: float = 2.0
    grad_accum: int = 1
    log_step: int = 200
    val_step: int = 500
    save_step: int = 1000
    vse_mean_warmup_epochs: int = 1
    embedding_warmup_epochs: int = 0
    max_violation: bool = False
    max_bad_images: int = 100
    skip_nonfinite: int = 0
    amp: str = "off"

    @classmethod
    def from_args(cls, args: argparse.Namespace, total_steps: int) -> Settings:
        """Return the flags' values; --log_step 0 follows the length of the run."""
        values = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        return cls(**{**values, "log_step": args.log_step or entries_apart(total_steps)})
