"""The flags that say how the encoders are read and trained, and what they ask of a method."""

from __future__ import annotations

import argparse

from lib.errors import InputError
from lib.methods.options import MethodOptions

FREEZE = ("none", "image", "text", "both")


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both encoders that are not names."""
    group = parser.add_argument_group("encoders")
    group.add_argument(
        "--image_cls",
        type=int,
        default=1,
        help="0: methods get the patches alone, without a ViT's [CLS], as from a Swin",
    )
    group.add_argument(
        "--image_norm",
        default=None,
        choices=["model", "imagenet"],
        help="mean and std of pixels, filter of the resize: the image encoder's own "
        "(preprocessor_config.json) or ImageNet's, bicubic; default: imagenet for vit and swin, as "
        "the LAPS family does, model for others",
    )
    group.add_argument(
        "--freeze",
        default="none",
        choices=FREEZE,
        help="backbones that keep their pretrained weights",
    )
    group.add_argument(
        "--lora_rank",
        type=int,
        default=0,
        help="train low-rank layers of that rank in the place of the backbones that are not frozen "
        "(needs peft); 0: the backbones themselves",
    )


def check_freeze(args: argparse.Namespace) -> None:
    """Raise InputError where `args.freeze` names a side that has no backbone, or leaves no LoRA."""
    if args.lora_rank and args.freeze == "both":
        raise InputError("--lora_rank with --freeze both: no backbone is left to adapt")
    nothing = {
        "image": "precomputed regions have no image encoder" if args.precomp else None,
        "text": "a GRU has no pretrained weights" if args.text_encoder == "gru" else None,
    }
    for side, reason in nothing.items():
        if reason and args.freeze in (side, "both"):
            raise InputError(f"--freeze {args.freeze}: {reason} to keep; freeze the other side")


def without_features(method: type[MethodOptions], precomp: bool) -> str | None:
    """Return why --feature_cache is nothing to `method`; None where it reads what is cached."""
    if precomp:
        return "precomputed regions are no pixels to encode"
    if not method.uses_pixels:
        return f"--method {method.name} reads no pixels to encode"
    if not method.takes_features:
        return (
            f"--method {method.name} cuts into the image encoder, whose last hidden state is all "
            "that the cache keeps"
        )
    return None


def check_feature_cache(
    args: argparse.Namespace, method: type[MethodOptions], training: bool = True
) -> None:
    """Raise InputError where `args.feature_cache` can't serve `method`, in `training` or at all."""
    if not getattr(args, "feature_cache", None):
        return
    useless = without_features(method, args.precomp)
    if useless:
        raise InputError(f"--feature_cache: {useless}; leave it out")
    if training and args.freeze not in ("image", "both"):
        raise InputError(
            "--feature_cache keeps what a frozen image encoder says: add --freeze image (or both)"
        )
