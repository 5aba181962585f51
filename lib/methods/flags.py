"""Flags that several methods read; names follow the LAPS family, ranges are in lib/ranges.py."""

from __future__ import annotations

import argparse
from typing import Any

from lib.errors import InputError
from lib.flags import side_lengths
from lib.model.alignment import DENSE_MATCHES

MATCH_WEIGHT = 0.1  # where the learnt weight of --dense_match starts
SLIMMING_FLAGS = ("sparse_ratio", "aggr_ratio", "ratio_weight", "detach_patches")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model flags that several methods read."""
    _add_encoders(parser.add_argument_group("model"))
    _add_sizes(parser.add_argument_group("sizes"))
    _add_slimming(parser.add_argument_group("patch slimming (seps, laps and their kin)"))
    dense = parser.add_argument_group("dense text (seps, dense_text)")
    dense.add_argument(
        "--dense_match",
        default="none",
        choices=[*DENSE_MATCHES, "none"],
        help="match captions with the images' dense texts and add that to the similarity: best "
        "words both ways; cosine of mean embeddings; cosine in the text encoder as it was before "
        "training (ours); not at all. dense_text, this match alone, takes none for max_mean",
    )
    dense.add_argument(
        "--match_weight",
        type=float,
        default=MATCH_WEIGHT,
        help="where that match's learnt weight starts; a short training hardly moves it",
    )
    dense.add_argument(
        "--match_gate",
        default="none",
        choices=["none", "image"],
        help="image: each image has its own, by how its patches and dense text agree (ours)",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss",
        default="vse",
        choices=["vse", "trip", "infonce"],
        help="vse: hinge triplet; trip: distance-weighted sampling, scores stretched to [-1, 1] "
        "for it; infonce: symmetric InfoNCE",
    )
    loss.add_argument("--margin", type=float, default=0.2, help="margin of the triplet losses")
    loss.add_argument(
        "--global_weight",
        type=float,
        default=0.0,
        help="weight of a loss on the cosine of mean embeddings, trained beside the method: what "
        "eval.py --rerank makes its shortlists by; 0: none",
    )
    loss.add_argument(
        "--global_loss", default="vse", choices=["vse", "infonce"], help="which loss that is"
    )


def _add_encoders(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    group.add_argument(
        "--vit_type",
        default="vit",
        help="image encoder: vit|vit_224, vit_384, swin|swin_224, swin_384, tiny (from scratch), "
        "timm/NAME, or the Hugging Face id or folder of any image encoder of transformers",
    )
    group.add_argument(
        "--bert_path",
        default="bert-base-uncased",
        help="text encoder: a Hugging Face id, a local folder, or tiny (from scratch)",
    )
    group.add_argument(
        "--text_encoder",
        default="bert",
        choices=["bert", "gru"],
        help="gru: a bidirectional GRU over words learnt from the captions, as SCAN, VSE++ and "
        "SGRAF had; --bert_path is then not used",
    )
    group.add_argument("--word_dim", type=int, default=300, help="embedding width of the GRU")
    group.add_argument("--gru_dropout", type=float, default=0.4, help="of the GRU's embeddings")
    group.add_argument(
        "--img_res",
        type=side_lengths,
        default=224,
        help="image side in pixels, or HEIGHTxWIDTH; position embeddings are interpolated to it",
    )
    group.add_argument(
        "--precomp",
        type=int,
        default=0,
        help="1: images are precomputed region features, not pixels; --vit_type is not used",
    )
    group.add_argument(
        "--region_dim", type=int, default=2048, help="channels of a precomputed region"
    )


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_word", type=int, default=90, help="longest caption in word pieces; the rest is cut"
    )
    group.add_argument(
        "--max_dense_word",
        type=int,
        default=None,
        help="longest dense text; 0: as --max_word (default: 256, or what the text encoder reads; "
        "seps_released: whole in training, --max_word in evaluation)",
    )
    group.add_argument("--tiny_width", type=int, default=64, help="width of the tiny encoders")
    group.add_argument("--tiny_layers", type=int, default=2, help="layers of the tiny encoders")
    group.add_argument("--tiny_patch_size", type=int, default=16, help="patch of the tiny ViT")
    group.add_argument(
        "--shard_size",
        type=int,
        default=64,
        help="the similarity works on at most shard_size x shard_size pairs at once; more of them "
        "are computed again in the backward pass",
    )
    group.add_argument("--gradient_checkpointing", type=int, default=0, help="backbones recompute")


def _add_slimming(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sparse_ratio", type=float, default=0.5, help="share of patches kept")
    group.add_argument(
        "--aggr_ratio", type=float, default=0.4, help="aggregated patches per kept patch"
    )
    group.add_argument(
        "--attention_weight", type=float, default=0.8, help="attention's share of a patch's score"
    )
    group.add_argument("--ratio_weight", type=float, default=2.0, help="weight of ratio loss")
    group.add_argument(
        "--detach_patches",
        type=int,
        default=None,
        help="1: patches are taken without gradient, as the released SEPS code does (its preset's "
        "default); 0: with gradient (the default elsewhere)",
    )


def dense_owner(dense_side: str, dense_match: str) -> str | None:
    """Return who is given the dense text. Raises InputError where that would mix protocols."""
    if dense_match == "none":
        return None if dense_side == "none" else dense_side
    if dense_side == "caption":
        raise InputError(
            f"--dense_match {dense_match} matches the dense texts of gallery images, and "
            "--dense_side caption reads that of the caption's own image: give --dense_side image "
            "or none"
        )
    return "image"


def check_match(args: argparse.Namespace) -> None:
    """Raise InputError where the flags of --dense_match contradict each other."""
    dense_owner(args.dense_side, args.dense_match)
    if args.dense_match != "none":
        return
    for flag, default in {"match_weight": MATCH_WEIGHT, "match_gate": "none"}.items():
        if getattr(args, flag) != default:
            raise InputError(
                f"--{flag} is about --dense_match: give --dense_match max_mean, or leave it"
            )


def settings_of(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """Return the values of flags that a constructor takes under the same names."""
    return {name: getattr(args, name) for name in names.split()}
