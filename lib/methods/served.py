"""Flags of eval.py that serve some models and not others: controls, cached features, attention."""

from __future__ import annotations

import argparse
from collections.abc import Collection

import torch

from lib.errors import InputError
from lib.methods.base import Method
from lib.methods.encoder_flags import without_features
from lib.model.attention import cls_attention
from lib.model.selection import control_selection

MEMBER_FLAGS = "feature_cache", "selection_control"  # may serve one member of an ensemble alone


def has_patch_choice(method: type[Method]) -> bool:
    """Return whether the method weighs patches against each other (--sparse_ratio 1 keeps all)."""
    return method.patch_choice is not Method.patch_choice


def without_idle(
    args: argparse.Namespace, model: Method, precomp: bool, flags: Collection[str]
) -> argparse.Namespace:
    """Return `args` without those of the `flags` (of MEMBER_FLAGS) that can do nothing for it."""
    useful = {
        "feature_cache": without_features(type(model), precomp) is None,
        "selection_control": has_patch_choice(type(model)),
    }
    idle = {flag: None for flag in flags if not useful[flag]}
    return argparse.Namespace(**{**vars(args), **idle})


def set_control(model: Method, control: str | None, seed: int) -> None:
    """Put a control in the place of the model's choice; InputError where it keeps all patches."""
    if control and not control_selection(model, control, seed):
        raise InputError(
            f"--selection_control {control}: {model.name} keeps all patches; leave out the flag"
        )


def check_attention(model: Method, precomp: bool) -> None:
    """Raise InputError, before the work, where --attention_kept would have nothing to tell."""
    if precomp or not (model.uses_pixels and has_patch_choice(type(model))):
        raise InputError(f"--attention_kept: {model.name} keeps all it reads; leave out the flag")
    cls_attention(model.image_encoder, torch.device("cpu"))
