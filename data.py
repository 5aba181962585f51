"""Arguments -> splits and loaders: what train.py, eval.py and the tools read their data with."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from arguments import image_path
from lib import distributed
from lib.data.image_cache import ImageCache
from lib.data.layout import dense_file
from lib.data.loaders import TrainLoader, caption_loader, image_loader, train_loader
from lib.data.scenes.generate import generate_scenes
from lib.data.sources import EvalCaptions, EvalImages, TrainSet
from lib.data.splits import (
    Split,
    hold_out,
    load_region_split,
    load_split,
    region_dense_file,
    region_files,
)
from lib.errors import InputError
from lib.methods.registry import get_method
from lib.retrieval.evaluation import SplitLoaders
from lib.retrieval.similarity import shard
from lib.training.logs import RunLog
from vocab import WordTokenizer

HELD_OUT_IMAGES = 1000  # of the training split, where dev can't choose the checkpoint


def prepare_scenes(args: argparse.Namespace) -> None:
    """Draw the embedded data set, where it is asked for and not there yet."""
    if args.dataset == "scenes" and not args.precomp:
        distributed.on_main(lambda: _draw_scenes(args))


def _draw_scenes(args: argparse.Namespace) -> None:
    try:
        with tqdm(desc="drawing scenes", leave=False, ncols=80) as bar:
            generate_scenes(
                Path(args.data_path) / "scenes",
                sizes=tuple(args.scenes_size),
                image_size=max(64, min(224, args.img_res)),
                progress=lambda done, total: _show(bar, done, total),
            )
    except ValueError as error:
        raise InputError(f"--scenes_size or --img_res: {error}") from None


def load_splits(args: argparse.Namespace, log: RunLog) -> tuple[Split, Split]:
    """Return the training split and the one that chooses the checkpoint.

    Where dev lacks what the method needs, training images are held out in its place, and the log
    says so. Raises InputError for anything wrong with the files.
    """
    needs_dense = get_method(args.method).wants_dense(args) is not None
    training = read_split(args, "train", needs_dense)
    missing = _missing_for_validation(args, needs_dense)
    if args.val_split != "held_out":  # a run that goes on stays with what it held out
        if missing is None:
            return training, read_split(args, args.val_split, needs_dense)
        args.val_split = "held_out"
    count = min(HELD_OUT_IMAGES, max(1, len(training.image_ids) // 20))
    log.say(
        f"{count} training images are held out to choose the checkpoint, as dev has no "
        f"{missing or 'part in this run'}; with that file there a new run takes the real dev split"
        f"{_describe_hint(args, missing)}; --val_split test is the official habit"
    )
    return hold_out(training, count)


def _describe_hint(args: argparse.Namespace, missing: str | None) -> str:
    if missing is None or not missing.endswith(".jsonl"):
        return ""
    return f" (python -m tools.describe --dataset {args.dataset} --split dev writes it)"


def read_split(args: argparse.Namespace, name: str, needs_dense: bool) -> Split:
    """Return split `name` of `args.dataset`: image files, or with --precomp region features.

    Raises InputError for anything wrong with the files.
    """
    if args.precomp:
        return load_region_split(
            args.data_path, args.dataset, name, args.region_dim, needs_dense=needs_dense
        )
    return load_split(
        args.data_path,
        args.dataset,
        name,
        image_path=image_path(args),
        needs_dense=needs_dense,
        check_images=get_method(args.method).uses_pixels,
    )


def _missing_for_validation(args: argparse.Namespace, needs_dense: bool) -> str | None:
    """Return the file without which dev can't be used, None where all are there."""
    if args.val_split == "test":
        return None
    folder = Path(args.data_path) / args.dataset
    needed = [folder / "dev_caps.txt", folder / "dev_ids.txt"]
    dense = dense_file(args.data_path, args.dataset, "dev")
    if args.precomp:
        needed = list(region_files(args.data_path, args.dataset, "dev"))
        dense = region_dense_file(args.data_path, args.dataset, "dev")
    if needs_dense:
        needed.append(dense)
    return next((str(path) for path in needed if not path.exists()), None)


def _show(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def open_image_cache(args: argparse.Namespace) -> ImageCache | None:
    """Return the cache of --image_cache, None without. Raises InputError for an unfit folder."""
    return ImageCache(args.image_cache) if args.image_cache else None


def training_loader(
    args: argparse.Namespace,
    split: Split,
    tokenizer: WordTokenizer,
    owner: str | None,
    pin: bool,
    cache: ImageCache | None = None,
) -> TrainLoader:
    """Return the loader of this rank's training pairs; `owner` is who is given the dense text."""
    dataset = TrainSet(
        split,
        tokenizer,
        args.img_res if get_method(args.method).uses_pixels else None,
        args.max_word,
        augment_images=bool(args.image_augment),
        augment_words=bool(args.size_augment),
        seed=args.seed,
        max_dense_word=_dense_words(args) if owner is not None else None,
        cache=cache,
    )
    ranks = {"rank": distributed.rank(), "world": distributed.world_size()}
    return train_loader(dataset, args.batch_size, args.workers, pin, **ranks)


def validation_loaders(
    args: argparse.Namespace,
    split: Split,
    tokenizer: WordTokenizer,
    owner: str | None,
    pin: bool,
    cache: ImageCache | None = None,
) -> SplitLoaders:
    """Return this rank's share of a split, ready for evaluation."""
    dense_words = _dense_words(args)
    img_res = args.img_res if get_method(args.method).uses_pixels else None
    images = EvalImages(split, img_res, tokenizer, dense_words if owner == "image" else None, cache)
    captions = EvalCaptions(
        split, tokenizer, args.max_word, dense_words if owner == "caption" else None
    )
    workers = min(args.workers, 4)
    return SplitLoaders(
        images=image_loader(images, args.batch_size, shard(len(images)), workers, pin),
        captions=caption_loader(captions, args.batch_size, shard(len(captions)), 0, pin),
        caption_images=split.caption_image,
        num_images=len(images),
        name=split.name,
    )


def _dense_words(args: argparse.Namespace) -> int:
    return args.max_dense_word or args.max_word
