"""Flags of a training: how long, on what, how fast; and of its optimizer."""

from __future__ import annotations

import argparse

from lib.flags import IntegerList, Ratios


def add_amp_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flag of mixed precision, which evaluation has too."""
    group.add_argument(
        "--amp", default="off", choices=["off", "bf16", "fp16"], help="mixed precision"
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add how long and on what is trained."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=int, default=128, help="pairs per process")
    group.add_argument("--num_epochs", type=int, default=30, help="times through the pairs")
    group.add_argument("--max_violation", action="store_true", help="hardest negative throughout")
    group.add_argument(
        "--vse_mean_warmup_epochs",
        type=int,
        default=1,
        help="epochs with the sum over negatives, before the hardest negative",
    )
    group.add_argument(
        "--embedding_warmup_epochs",
        type=int,
        default=0,
        help="number of the epoch over which the alignment loss rises from 0 (-1: none)",
    )
    group.add_argument(
        "--grad_accum",
        type=int,
        default=1,
        help="batches per optimizer step: their gradients are averaged, and negatives are taken "
        "within each batch",
    )
    group.add_argument(
        "--cached_batch",
        type=int,
        default=0,
        metavar="N",
        help="encode a batch in chunks of N pairs, each once more in the backward pass: the same "
        "gradient with the encoders' memory of N pairs; 0: the whole batch at once",
    )
    add_amp_flag(group)
    group.add_argument("--compile", type=int, default=0, help="torch.compile the backbones")
    group.add_argument(
        "--skip_nonfinite", type=int, default=0, help="tolerated non-finite steps in a row"
    )


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add AdamW's flags and those of the learning rate."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="AdamW's")
    group.add_argument(
        "--backbone_lr_ratio",
        action=Ratios,
        default=0.1,
        metavar="R",
        help="the backbones' rate to that; two numbers: the image's,the text's",
    )
    group.add_argument("--weight_decay", type=float, default=1e-4, help="AdamW's")
    group.add_argument("--beta2", type=float, default=0.999, help="AdamW's second beta")
    group.add_argument("--grad_clip", type=float, default=2.0, help="gradient norm; 0: no limit")
    group.add_argument(
        "--lr_policy", default="step", choices=["step", "cosine"], help="how the rate falls"
    )
    group.add_argument(
        "--lr_schedules",
        action=IntegerList,
        default=[9, 15, 20, 25],
        metavar="EPOCH",
        help="epochs of step decay, 9 15 20 25 or 9,15,20,25",
    )
    group.add_argument("--decay_rate", type=float, default=0.3, help="factor of step decay")
    group.add_argument(
        "--lr_warmup_steps", type=int, default=0, help="steps over which the rate rises"
    )
