"""Train a model: python train.py --dataset f30k --logger_name runs/f30k_vit …; see README.md."""

from __future__ import annotations

import os

# read when torch loads: OpenMP threads that spin for long slow a busy CPU many times down
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from arguments import image_path, parse_train
from data import (
    EvalCaptions,
    EvalImages,
    Split,
    TrainSet,
    caption_loader,
    image_loader,
    load_region_split,
    load_split,
    train_loader,
)
from lib import distributed
from lib.checkpoint import (
    BEST,
    LAST,
    load_training_state,
    load_weights,
    model_payload,
    save_payload,
)
from lib.engine import Settings, Trainer
from lib.errors import InputError, NonFiniteError
from lib.evaluation import SplitLoaders
from lib.image_cache import ImageCache
from lib.logs import RunLog
from lib.methods.base import Method
from lib.methods.registry import build_model, get_method
from lib.optim import Schedule, build_optimizer, cosine_decay, step_decay, with_warmup
from lib.pictures import KeptPatchStrip
from lib.scenes import generate_scenes
from lib.similarity import shard
from lib.splits import hold_out, region_dense_file, region_files
from vocab import WordTokenizer, learn_vocabulary, load_tokenizer

HELD_OUT_IMAGES = 1000  # of the training split, where dev can't choose the checkpoint
PICTURED_PAIRS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; return the exit code.

    0: done, 1: a checkpoint could not be written, 2: bad input, 3: a loss was not finite, 130: a
    signal stopped the run after saving.
    """
    try:
        args = parse_train(argv)
        args = _arguments_of_resumed(args, argv)
        finished = run(args)
        distributed.stop()  # after an error the other processes may still be waiting for this one
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"error: {error}; the last checkpoint is kept", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was saved before is whole", file=sys.stderr)
        return 130
    return 0 if finished else 130


def run(args: argparse.Namespace) -> bool:
    """Train from parsed arguments; return False where a signal stopped it early."""
    device = start_processes(args)
    if args.overwrite and args.resume is None:
        clear_run(Path(args.logger_name))
    log = RunLog(args.logger_name, active=distributed.is_main())
    try:
        return _run(args, device, log)
    except (InputError, NonFiniteError, OSError) as error:
        log.say(f"stopped: {error}")
        raise
    finally:
        log.close()


def _run(args: argparse.Namespace, device: torch.device, log: RunLog) -> bool:
    log.say(f"{args.method} on {args.dataset}, {_device_name(device)}")
    cache = open_image_cache(args)
    prepare_scenes(args)
    training, validation = load_splits(args, log)
    tokenizer = training_tokenizer(args, training)
    set_seed(args.seed)
    model = build_model(args, tokenizer.vocab_size).to(device)
    if args.gradient_checkpointing:
        _recompute_backbones(model)
    state = _saved_state(args)
    if state is not None:
        load_weights(Path(args.resume) / LAST, model, state["model"])
    trainer = build_trainer(args, model, tokenizer, training, validation, device, log, cache)
    if distributed.world_size() > 1:
        set_seed(args.seed + distributed.rank())  # dropout and Gumbel noise differ between ranks
    if state is not None:
        trainer.load_training_state(state["training"])
        log.say(f"going on at step {trainer.progress.step}, epoch {trainer.progress.epoch}")
    log.open_curves(trainer.progress.step)
    log.arguments(args)
    if distributed.is_main():
        tokenizer.save(args.logger_name)
    parameters = sum(p.numel() for p in model.parameters())
    log.say(f"{parameters:,} parameters, {trainer.batches_per_epoch} steps an epoch")
    finished = trainer.fit()
    if finished:
        log.say(f"done: best rSum {trainer.progress.best_rsum:.1f} in {args.logger_name}/{BEST}")
    else:
        log.say(f"stopped and saved; go on with --resume {args.logger_name}")
    return finished


# --- processes, devices, seeds -----------------------------------------------------------------


def start_processes(args: argparse.Namespace) -> torch.device:
    """Join the other processes where there are any; return this one's device."""
    cuda = torch.cuda.is_available()
    if not args.multi_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torch.distributed.run started several processes: add --multi_gpu 1")
    if args.multi_gpu:
        backend = args.dist_backend if cuda else "gloo"
        if args.world_size > 1 or "RANK" in os.environ:
            distributed.start(backend, args.dist_url, args.world_size, args.rank)
        args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    if not cuda:
        if distributed.is_main():
            print("no CUDA device: running on the CPU")
        return torch.device("cpu")
    index = args.local_rank if args.multi_gpu else args.gpu_id
    if not 0 <= index < torch.cuda.device_count():
        raise InputError(
            f"--gpu-id {index}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def clear_run(folder: Path) -> None:
    """Remove what a former run left in a folder that is to be written over."""
    if distributed.is_main():
        for pattern in (LAST, BEST, "results.json", "args.json", "train.log", "events.out*"):
            for path in folder.glob(pattern):
                path.unlink()
    distributed.barrier()


def _device_name(device: torch.device) -> str:
    processes = distributed.world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{processes} processes on {name}" if processes > 1 else name


def set_seed(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _backbones(model: Method) -> Iterator[nn.Module]:
    for encoder in (model.image_encoder, model.text_encoder):
        if encoder is not None and hasattr(encoder, "backbone"):
            yield encoder.backbone


def _recompute_backbones(model: Method) -> None:
    for backbone in _backbones(model):
        # the new name since transformers 5.23; 4.x has the old one alone
        new = getattr(backbone, "activation_checkpointing_enable", None)
        (new or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def _show(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


# --- data --------------------------------------------------------------------------------------


def prepare_scenes(args: argparse.Namespace) -> None:
    """Draw the embedded data set, where it is asked for and not there yet."""
    if args.dataset != "scenes" or args.precomp:
        return
    if distributed.is_main():
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
    distributed.barrier()


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
        f"{missing or 'part in this run'}; with that file there a new run takes the real dev split,"
        " --val_split test is the official habit"
    )
    return hold_out(training, count)


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
    dense = folder / f"{args.dataset}_dev.jsonl"
    if args.precomp:
        needed = list(region_files(args.data_path, args.dataset, "dev"))
        dense = region_dense_file(args.data_path, args.dataset, "dev")
    if needs_dense:
        needed.append(dense)
    return next((str(path) for path in needed if not path.exists()), None)


def training_tokenizer(args: argparse.Namespace, training: Split) -> WordTokenizer:
    """Return the tokenizer of --bert_path; for tiny, a vocabulary learnt from training texts."""
    if args.bert_path != "tiny":
        return load_tokenizer(args.bert_path)
    saved = Path(args.logger_name) / "vocab.txt"
    if args.resume and saved.exists():
        return load_tokenizer("tiny", vocab_file=saved)
    return WordTokenizer(learn_vocabulary([*training.captions, *(training.dense or [])]))


def open_image_cache(args: argparse.Namespace) -> ImageCache | None:
    """Return the cache of --image_cache, None without. Raises InputError for an unfit folder."""
    return ImageCache(args.image_cache) if args.image_cache else None


def validation_loaders(
    args: argparse.Namespace,
    split: Split,
    tokenizer: WordTokenizer,
    owner: str | None,
    pin: bool,
    cache: ImageCache | None = None,
) -> SplitLoaders:
    """Return this rank's share of a split, ready for evaluation."""
    dense_words = args.max_dense_word or args.max_word
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


# --- the trainer -------------------------------------------------------------------------------


def build_trainer(
    args: argparse.Namespace,
    model: Method,
    tokenizer: WordTokenizer,
    training: Split,
    validation: Split,
    device: torch.device,
    log: RunLog,
    cache: ImageCache | None = None,
) -> Trainer:
    """Return the trainer with loaders, optimizer and schedule as the flags say."""
    pin = device.type == "cuda"
    dense_words = args.max_dense_word or args.max_word
    dataset = TrainSet(
        training,
        tokenizer,
        args.img_res if model.uses_pixels else None,
        args.max_word,
        augment_images=bool(args.image_augment),
        augment_words=bool(args.size_augment),
        seed=args.seed,
        max_dense_word=dense_words if model.dense_owner is not None else None,
        cache=cache,
    )
    ranks = {"rank": distributed.rank(), "world": distributed.world_size()}
    batches = train_loader(dataset, args.batch_size, args.workers, pin, **ranks)
    steps_per_epoch = -(-len(batches) // args.grad_accum)  # the rest of an epoch is a step too
    optimizer = build_optimizer(
        model, args.learning_rate, args.backbone_lr_ratio, args.weight_decay, args.beta2
    )
    if args.compile:
        _compile_backbones(model)
    loaders = validation_loaders(args, validation, tokenizer, model.dense_owner, pin, cache)
    pictured = model.uses_pixels and not args.precomp  # regions are no picture

    def save(name: str, trainer: Trainer) -> None:
        payload = _payload(args, tokenizer, trainer, name)  # collective: every rank's random state
        error = None
        if distributed.is_main():
            try:
                save_payload(Path(args.logger_name) / name, payload)
            except OSError as caught:
                error = caught
        if not distributed.all_true(error is None, device):
            raise error or OSError("the process of rank 0 could not write the checkpoint")

    return Trainer(
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(args, steps_per_epoch),
        train_batches=batches.batches,
        batches_per_epoch=len(batches),
        pairs_per_batch=args.batch_size * distributed.world_size(),
        image_names=training.image_ids,
        validation=loaders,
        settings=Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__}),
        device=device,
        log=log,
        save=save,
        picture=_strip(validation, loaders, device) if pictured else None,
    )


def build_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """Return the learning-rate factor over steps."""
    if args.lr_policy == "cosine":
        schedule = cosine_decay(args.num_epochs * steps_per_epoch)
    else:
        schedule = step_decay(steps_per_epoch, args.lr_schedules, args.decay_rate)
    return with_warmup(schedule, args.lr_warmup_steps)


def _compile_backbones(model: Method) -> None:
    for backbone in _backbones(model):
        backbone.compile(dynamic=True)  # in place, so that the weights keep their names


def _payload(
    args: argparse.Namespace, tokenizer: WordTokenizer, trainer: Trainer, name: str
) -> dict:
    progress = trainer.progress
    payload = model_payload(
        trainer.model,
        args,
        tokenizer.tokens,
        epoch=progress.epoch,
        step=progress.step,
        best_rsum=progress.best_rsum,
        val_split=args.val_split,
        hard_negatives=trainer.model.criterion.hard_negatives,
    )
    if name == LAST:
        payload["training"] = trainer.training_state()
    return payload


def _strip(validation: Split, loaders: SplitLoaders, device: torch.device) -> KeptPatchStrip | None:
    """Return what draws the first images of the split, each with its first caption."""
    rows = range(min(PICTURED_PAIRS, len(validation.image_ids)))
    captions = [int(np.flatnonzero(validation.caption_image == row)[0]) for row in rows]
    images = loaders.images.first(rows)
    texts = loaders.captions.first(captions)
    return KeptPatchStrip(images, texts, [validation.captions[j] for j in captions], device)


# --- going on with a run -----------------------------------------------------------------------


def _arguments_of_resumed(
    args: argparse.Namespace, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Return the arguments of the run that goes on, flags given now laid over them.

    torchrun's restart of failed workers goes on by itself. Raises InputError where the folder holds
    no run, or where a new run would write over an old one.
    """
    folder = Path(args.logger_name)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if args.resume is None and restarted and (folder / LAST).exists():
        args.resume = str(folder)
    if args.resume is None:
        if any((folder / name).exists() for name in (LAST, BEST)) and not args.overwrite:
            raise InputError(
                f"{folder} already holds a run: go on with --resume {folder}, choose another "
                "--logger_name, or start anew with --overwrite 1"
            )
        return args
    saved = Path(args.resume) / "args.json"
    if not saved.exists():
        raise InputError(f"--resume {args.resume}: no args.json there, so no run to go on with")
    return parse_train(
        argv, saved_arguments=saved, logger_name=args.resume, resume=args.resume, overwrite=0
    )


def _saved_state(args: argparse.Namespace) -> dict | None:
    """Return the checkpoint to go on from; None starts at the beginning."""
    if args.resume is None or not (Path(args.resume) / LAST).exists():
        return None
    state = load_training_state(Path(args.resume) / LAST)
    if state["method"] != args.method:
        raise InputError(f"--resume {args.resume} holds a {state['method']} run, not {args.method}")
    return state


if __name__ == "__main__":
    sys.exit(main())
