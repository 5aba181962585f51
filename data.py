"""Arguments -> splits, tokenizer, loaders: how train.py, eval.py and the tools read their data."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import image_path
from lib import distributed
from lib.batch import image_size
from lib.data.features import FeatureCache, fill_share, wanted_views
from lib.data.image_cache import ImageCache
from lib.data.layout import dense_file, dense_way_out, describe_command
from lib.data.loaders import EvalLoader, TrainLoader, eval_loader, train_loader
from lib.data.model_tokenizer import ModelTokenizer
from lib.data.scenes.facts import sibling_captions
from lib.data.scenes.generate import generate_scenes
from lib.data.shard_loader import ShardLoader, plan_share
from lib.data.shards import ShardSet, ShardStream, open_shards
from lib.data.sources import EvalCaptions, EvalImages, ImageFolderSource, TrainSet, cut_line
from lib.data.splits import (
    HELD_OUT,
    Split,
    first_captions,
    first_images,
    hold_out,
    load_region_split,
    load_split,
    region_dense_file,
    region_files,
    warn_of_shared_images,
)
from lib.errors import InputError
from lib.methods.encoder_flags import check_feature_cache
from lib.methods.registry import get_method
from lib.model.encoders import ImageEncoder, frozen_states
from lib.model.precision import autocast_for
from lib.retrieval.evaluation import SplitLoaders
from lib.retrieval.protocol import repeated_captions
from lib.retrieval.similarity import shard
from lib.training.logs import RunLog
from vocab import (
    CaptionTokenizer,
    WordTokenizer,
    checkpoint_tokenizer,
    learn_vocabulary,
    learn_words,
    load_tokenizer,
)

HELD_OUT_IMAGES = 1000  # of the training split, where dev can't choose the checkpoint


def prepare_scenes(args: argparse.Namespace) -> None:
    """Draw the embedded data set, where it is asked for and not there yet."""
    if args.dataset == "scenes" and not args.precomp:
        distributed.once_a_host(lambda: _draw_scenes(args))


def _draw_scenes(args: argparse.Namespace) -> None:
    try:
        with tqdm(total=sum(args.scenes_size), desc="drawing scenes", leave=False, ncols=80) as bar:
            generate_scenes(
                Path(args.data_path) / "scenes",
                sizes=tuple(args.scenes_size),
                image_size=max(64, min(224, *image_size(args.img_res))),
                progress=lambda done, _: bar.update(done - bar.n),
            )
    except ValueError as error:
        raise InputError(f"--scenes_size or --img_res: {error}") from None


def load_splits(args: argparse.Namespace, log: RunLog) -> tuple[Split | ShardSet, Split]:
    """Return the training split and the one that chooses the checkpoint.

    Where dev lacks what the method needs, training images are held out and the log says so; shards
    need a dev split beside them. Raises InputError for anything wrong with the files.
    """
    method = get_method(args.method)
    needs_dense = method.wants_dense(args) is not None
    if args.shards:
        return _shards(args, log), _validation_split(args, needs_dense)
    training = read_split(args, "train", method.trains_on_dense(args))
    missing = _missing_for_validation(args, needs_dense)
    if args.val_split != HELD_OUT:  # a run that goes on stays with what it held out
        if missing is None:
            validation = _validation_split(args, needs_dense)
            if not args.precomp:  # the ids of regions are rows
                warn_of_shared_images(validation, training.image_ids, training.name)
            return first_captions(training, args.captions_per_image), validation
        args.val_split = HELD_OUT
    count = min(HELD_OUT_IMAGES, max(1, len(training.image_ids) // 20))
    log.say(
        f"{count} training images are held out to choose the checkpoint, as dev has no "
        f"{missing or 'part in this run'}; with that file there a new run takes the real dev split"
        f"{_describe_hint(args, missing)}; --val_split test is the official habit"
    )
    training, held = hold_out(training, count)
    return first_captions(training, args.captions_per_image), first_images(held, args.val_images)


def _validation_split(args: argparse.Namespace, needs_dense: bool) -> Split:
    return first_images(read_split(args, args.val_split, needs_dense), args.val_images)


def _shards(args: argparse.Namespace, log: RunLog) -> ShardSet:
    """Return the training split in shards. Raises InputError where they can't be used."""
    for flag in "precomp image_cache feature_cache sibling_share captions_per_image".split():
        if getattr(args, flag):
            raise InputError(
                f"--shards and --{flag} exclude each other: shards are read in passing"
            )
    method = get_method(args.method)
    if method.pairs_from_dense(args):
        raise InputError(
            "--shards: the pairs are images and captions, this stage trains on dense texts"
        )
    dense = dense_file(args.data_path, args.dataset, "train")
    sizes = Path(args.shard_sizes) if args.shard_sizes else None
    way_out = dense_way_out(args.data_path, args.dataset, "train")
    shards = open_shards(args.shards, sizes, method.trains_on_dense(args), dense, way_out)
    log.say(
        f"{int(shards.sizes.sum()):,} images in {len(shards.paths)} shards; an epoch takes each "
        "once, with one of its captions"
    )
    return shards


def _describe_hint(args: argparse.Namespace, missing: str | None) -> str:
    if missing is None or not missing.endswith(".jsonl"):
        return ""
    return f" ({describe_command(args.data_path, args.dataset, 'dev')} writes it)"


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


def open_image_cache(args: argparse.Namespace) -> ImageCache | None:
    """Return the cache of --image_cache, None without. Raises InputError for an unfit folder."""
    return ImageCache(args.image_cache) if args.image_cache else None


def training_tokenizer(
    args: argparse.Namespace,
    training: Split,
    validation: Split | None = None,
    start: dict | None = None,
) -> WordTokenizer | ModelTokenizer:
    """Return the tokenizer of --bert_path; for tiny and a GRU, a vocabulary learnt from texts.

    A GRU's words are those of the training captions and, as in SCAN, of dev's where dev chooses.
    `start` is the checkpoint whose weights a run starts from: their words are taken with them.
    """
    if start is not None:
        return checkpoint_tokenizer(start, args.bert_path)
    gru = args.text_encoder == "gru"
    if args.bert_path != "tiny" and not gru:
        return load_tokenizer(args.bert_path)
    saved = Path(args.logger_name) / "vocab.txt"
    if args.resume and saved.exists():
        return load_tokenizer("tiny", vocab_file=saved)
    texts = [*training.captions, *(training.dense or [])]
    if not gru:
        return WordTokenizer(learn_vocabulary(texts))
    dev = validation.captions if validation is not None and validation.name == "dev" else []
    return CaptionTokenizer(learn_words([*texts, *dev]))


def suit_tokenizer(
    args: argparse.Namespace, tokenizer: WordTokenizer | ModelTokenizer, log: RunLog
) -> None:
    """Let the arguments agree with the tokenizer: its padding, and the longest text it makes."""
    args.pad_id = tokenizer.pad_id
    for flag in ("max_word", "max_dense_word"):
        if tokenizer.longest is not None and (getattr(args, flag) or 0) > tokenizer.longest:
            log.say(
                f"--{flag} {getattr(args, flag)}: texts are cut at {tokenizer.longest} tokens, the "
                f"longest that {args.bert_path} reads"
            )
            setattr(args, flag, tokenizer.longest)
    whole = get_method(args.method).dense_words(args)  # where 0 stands for more than --max_word
    if tokenizer.longest is not None and whole > tokenizer.longest:
        args.max_dense_word = tokenizer.longest


def training_loader(
    args: argparse.Namespace,
    split: Split | ShardSet,
    tokenizer: WordTokenizer,
    owner: str | None,
    pin: bool,
    cache: ImageCache | None = None,
    features: FeatureCache | None = None,
) -> TrainLoader | ShardLoader:
    """Return the loader of this rank's training pairs; `owner` is who is given the dense text."""
    if isinstance(split, ShardSet):
        return _shard_loader(args, split, tokenizer, owner, pin)
    method = get_method(args.method)
    described = method.pairs_from_dense(args)
    dense = method.trains_on_dense(args) and not described
    dataset = TrainSet(
        split.described() if described else split,
        tokenizer,
        args.img_res if method.uses_pixels else None,
        dense_words(args, training=True) if described else args.max_word,
        augment_images=bool(args.image_augment),
        augment_words=bool(args.size_augment),
        seed=args.seed,
        max_dense_word=dense_words(args, training=True) if dense else None,
        augment_dense=owner is None and bool(args.size_augment),  # it only teaches
        cache=cache,
        resample=_resample(args),
        features=features,
    )
    ranks = {"rank": distributed.rank(), "world": distributed.world_size()}
    siblings = None
    if args.sibling_share and not described:  # of captions
        siblings = sibling_captions(Path(args.data_path) / "scenes", split)
    return train_loader(
        dataset,
        args.batch_size,
        args.workers,
        pin,
        **ranks,
        siblings=siblings,
        sibling_share=args.sibling_share,
    )


def _shard_loader(
    args: argparse.Namespace,
    shards: ShardSet,
    tokenizer: WordTokenizer,
    owner: str | None,
    pin: bool,
) -> ShardLoader:
    share, workers = plan_share(
        int(shards.sizes.sum()),
        len(shards.paths),
        args.batch_size,
        args.workers,
        distributed.rank(),
        distributed.world_size(),
    )
    method, source = get_method(args.method), None
    if method.uses_pixels:
        augment = bool(args.image_augment)
        source = ImageFolderSource([], args.img_res, augment, resample=_resample(args))
    stream = ShardStream(
        shards,
        tokenizer,
        source,
        share,
        args.max_word,
        augment_words=bool(args.size_augment),
        seed=args.seed,
        max_dense_word=(dense_words(args, training=True) if method.trains_on_dense(args) else None),
        augment_dense=owner is None and bool(args.size_augment),
    )
    return ShardLoader(stream, workers, pin)


def validation_loaders(
    args: argparse.Namespace,
    split: Split,
    tokenizer: WordTokenizer,
    owner: str | None,
    pin: bool,
    cache: ImageCache | None = None,
    features: FeatureCache | None = None,
) -> SplitLoaders:
    """Return this rank's share of a split, ready for evaluation."""
    longest = dense_words(args)
    img_res = args.img_res if get_method(args.method).uses_pixels else None
    images = EvalImages(
        split,
        img_res,
        tokenizer,
        longest if owner == "image" else None,
        cache,
        _resample(args),
        features,
    )
    captions = EvalCaptions(
        split, tokenizer, args.max_word, longest if owner == "caption" else None
    )
    workers = min(args.workers, 4)
    return SplitLoaders(
        images=eval_loader(images, args.batch_size, shard(len(images)), workers, pin),
        captions=eval_loader(captions, args.batch_size, shard(len(captions)), 0, pin),
        caption_images=split.caption_image,
        num_images=len(images),
        name=split.name,
        repeated_share=repeated_captions(split.dense, split.captions, split.caption_image),
    )


def pixel_loader(args: argparse.Namespace, split: Split) -> EvalLoader:
    """Return every image of a split as pixels, in order, whatever the model itself is handed."""
    images = EvalImages(split, args.img_res, resample=_resample(args))
    return eval_loader(images, args.batch_size, range(len(images)), min(args.workers, 4))


def open_features(
    args: argparse.Namespace,
    encoder: ImageEncoder,
    splits: Sequence[tuple[Split, bool]],
    device: torch.device,
    say: Callable[[str], None] = print,
) -> FeatureCache | None:
    """Return the cache of --feature_cache, filled with the images of `splits`; None without.

    `splits` come with whether they are read with augmentation. Each process encodes its share of
    what is missing; `say` tells how many and how fast. Raises InputError where the folder is unfit.
    """
    if not args.feature_cache:
        return None
    check_feature_cache(args, get_method(args.method), training=False)
    layout = encoder.layout
    sides = "x".join(map(str, dict.fromkeys(encoder.img_res)))
    key = f"{encoder.digest()}-{sides}-{args.amp}"
    cache = FeatureCache(
        args.feature_cache, key, layout.num_tokens, layout.width, getattr(args, "feature_views", 0)
    )
    wanted = dict.fromkeys(
        key for split, augment in splits for key in wanted_views(split.image_files, augment, cache)
    )
    missing = cache.missing(wanted)
    if distributed.is_main():
        cache.describe({"image encoder": args.vit_type, "img_res": args.img_res, "amp": args.amp})
    if cache.views == 0 and any(augment for _, augment in splits):
        say("--feature_cache keeps plain images, not cropped or flipped: --feature_views N adds N")
    size = len(missing) * cache.entry_bytes / 2**30
    say(
        f"feature cache {cache.folder}: {len(wanted) - len(missing)} views of images there, "
        f"{len(missing)} to encode ({size:.1f} GiB)"
    )
    fill_share(
        cache,
        list(wanted),
        frozen_states(encoder, device, autocast_for(args.amp, device)),
        encoder.img_res,
        resample=encoder.preprocessing.resample,
        workers=args.workers,
        say=say,
    )
    return cache


def _resample(args: argparse.Namespace) -> str:
    """Return the filter that the model's image encoder likes images resized with."""
    return getattr(args, "image_filter", "bicubic")


def dense_words(args: argparse.Namespace, training: bool = False) -> int:
    """Return the word pieces at which dense texts are cut: no more than the encoder reads."""
    words = get_method(args.method).dense_words(args, training)
    return min(words, getattr(args, "text_positions", None) or words)


def dense_cut(
    args: argparse.Namespace, split: Split, tokenizer: WordTokenizer, training: bool = False
) -> str:
    """Return a line that says which share of a split's dense texts is cut, and where."""
    return cut_line(split.name, split.dense, tokenizer, dense_words(args, training))
