"""Flags of the data: where it lies, how it is read, what is trained on."""

from __future__ import annotations

import argparse

from lib.flags import IntegerList


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add where the data lies and how it is read, which every program needs."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="f30k",
        metavar="NAME",
        help="f30k, coco, scenes (drawn where missing) or any folder of --data_path",
    )
    group.add_argument("--data_path", default="data/", help="root folder of the data sets")
    group.add_argument(
        "--image_path",
        default=None,
        metavar="DIR",
        help="image folder; default: images in the data set's folder, for f30k and coco as below",
    )
    group.add_argument("--f30k_img_path", default=None, help="default: flickr30k-images in it")
    group.add_argument("--coco_img_path", default=None, help="default: coco-images in it")
    group.add_argument("--workers", type=int, default=8, help="loader processes per process")
    group.add_argument(
        "--image_cache",
        default=None,
        metavar="DIR",
        help="keep resized images there, to be decoded once; images to be cropped at random are "
        "kept shrunk, and their pixels differ by about 2 of 255 from those without the cache",
    )
    group.add_argument(
        "--feature_cache",
        default=None,
        metavar="DIR",
        help="keep there what a frozen image encoder (--freeze image) says of each image",
    )
    group.add_argument(
        "--scenes_size",
        action=IntegerList,
        default=[4000, 200, 200],
        metavar="N",
        help="train, dev and test images of the embedded data set",
    )


def add_training_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is trained on, how it is varied, and what chooses the checkpoint."""
    group = parser.add_argument_group("training data")
    _add_shards(group)
    group.add_argument(
        "--feature_views",
        type=int,
        default=0,
        help="cropped and flipped views of a training image that --feature_cache keeps; 0: the "
        "plain image alone",
    )
    group.add_argument(
        "--captions_per_image",
        type=int,
        default=0,
        metavar="N",
        help="train on the first N captions of each image alone (0: all)",
    )
    group.add_argument(
        "--size_augment", type=int, default=1, help="mask, replace and drop words in training"
    )
    group.add_argument(
        "--image_augment", type=int, default=1, help="random crop and flip in training"
    )
    group.add_argument(
        "--sibling_share",
        type=float,
        default=0.0,
        help="share of the pairs put into one batch with that of the sibling image, which differs "
        "in one fact (scenes alone has siblings)",
    )
    group.add_argument(
        "--val_split",
        default="dev",
        choices=["dev", "test"],
        help="split that chooses the checkpoint; test is the official habit, and is recorded",
    )
    group.add_argument(
        "--val_images",
        type=int,
        default=0,
        metavar="N",
        help="choose it on the first N images of that split alone (0: all)",
    )
    group.add_argument(
        "--max_bad_images", type=int, default=100, help="stop after more undecodable images"
    )


def _add_shards(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shards",
        default=None,
        metavar="PATTERN",
        help="train on WebDataset shards, 'shard-{000..099}.tar'; dev and test from --dataset",
    )
    group.add_argument(
        "--shard_sizes",
        default=None,
        metavar="FILE",
        help="JSON of each shard's samples; default: sizes.json beside them, else counted",
    )
