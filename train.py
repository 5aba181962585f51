"""Train a model: python train.py --dataset f30k --logger_name runs/f30k_vit …; see README.md."""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, which takes seconds
    from lib.program import prepare_terminal

    prepare_terminal()

import os

# read when torch loads: OpenMP threads that spin for long slow a busy CPU many times down
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arguments import given_folder, parse_train, process_settings, warn_of_unread_flags
from data import (
    dense_cut,
    load_splits,
    open_features,
    open_image_cache,
    prepare_scenes,
    suit_tokenizer,
    training_loader,
    training_tokenizer,
    validation_loaders,
)
from lib import distributed
from lib.checkpoints.checkpoint import (
    BEST,
    LAST,
    load_training_state,
    load_weights,
    start_weights,
)
from lib.checkpoints.payloads import read_payload
from lib.data.features import FeatureCache
from lib.data.fingerprint import check_same_files, fingerprint_differences, split_fingerprint
from lib.data.image_cache import ImageCache
from lib.data.splits import Split
from lib.errors import InputError, NonFiniteError, PeerError, WorkerError
from lib.methods.base import Method
from lib.methods.registry import build_model, get_method
from lib.model.encoders import image_filter
from lib.program import INTERRUPTED, program, run_program, warnings_told
from lib.rendezvous import peers_told
from lib.retrieval.pictures import first_pairs_strip
from lib.training.engine import Trainer
from lib.training.folder import check_folder, check_same_folder, check_same_run, claimed, clear_run
from lib.training.logs import RunLog
from lib.training.optim import build_optimizer, schedule_from_args
from lib.training.restart import was_restarted
from lib.training.saving import CheckpointWriter, run_payload
from lib.training.settings import Settings
from lib.training.setup import compile_backbones, keep_freed_memory, set_encoders_up, set_seed
from lib.training.trackers import tracker_names
from scoring import evaluate_best
from vocab import WordTokenizer


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; return the exit code.

    0: done, 1: the system failed the run (disk, memory, a process), 2: bad input, 3: a loss was not
    finite, 130: a signal stopped the run after saving.
    """
    args = parse_train(argv)
    args = _resumed(args, argv)
    warn_of_unread_flags(argv, args.method)
    with peers_told():
        finished = run(args)
        if finished and args.eval:
            evaluate_best(args)
    distributed.stop()  # after an error the other processes may still be waiting for this one
    return 0 if finished else INTERRUPTED


def run(args: argparse.Namespace) -> bool:
    """Train from parsed arguments; return False where a signal stopped it early."""
    device = distributed.start_processes(**process_settings(args))
    with claimed(args.logger_name, args.resume, bool(args.eval)):
        distributed.on_main(lambda: _check_folder(args))  # again, now that nobody else can
        log = RunLog(args.logger_name, distributed.is_main(), tracker_names(args.report_to))
        try:
            with warnings_told(log.say):
                return _run(args, device, log)
        except (InputError, NonFiniteError, WorkerError, PeerError, OSError) as error:
            log.say(f"stopped: {error}", only_in_file=True)
            raise
        finally:
            log.close()


def _run(args: argparse.Namespace, device: torch.device, log: RunLog) -> bool:
    log.say(f"{args.method} on {args.dataset}, {distributed.device_name(device)}")
    prepare_scenes(args)
    with distributed.together():
        start = _first_weights(args)
        cache = open_image_cache(args)
        training, validation = load_splits(args, log)
        tokenizer = training_tokenizer(args, training, validation, start)
        suit_tokenizer(args, tokenizer, log)
        data = split_fingerprint(training)
        state = _saved_state(args, data)
        model = _model(args, tokenizer, state, start).to(device)
    check_same_files(data)
    read = [(training, bool(args.image_augment)), (validation, False)]
    features = open_features(args, model.image_encoder, read, device, log.say)
    if training.dense is not None:
        log.say(dense_cut(args, training, tokenizer, training=True))
    trainer = build_trainer(
        args, model, tokenizer, (training, validation), device, log, cache, features
    )
    about = args, tokenizer.vocabulary, data
    trainer.describe = lambda: run_payload(model, trainer.progress, *about)
    if distributed.world_size() > 1:
        set_seed(args.seed + distributed.rank())  # dropout and Gumbel noise differ between ranks
    if state is not None:
        trainer.load_training_state(state["training"])
        epoch = min(trainer.progress.epoch + 1, args.num_epochs)
        log.say(f"going on at step {trainer.progress.step}, epoch {epoch}/{args.num_epochs}")
    if args.overwrite and args.resume is None:
        clear_run(args.logger_name)  # only now, as what can fail before a run begins is done
    distributed.on_main(lambda: log.begin(trainer.progress.step, args))  # a service may refuse
    distributed.on_main(lambda: tokenizer.save(args.logger_name))
    weights = sum(p.numel() for p in model.parameters())
    log.say(f"{weights:,} parameters, {trainer.batches_per_epoch} steps an epoch")
    finished = trainer.fit()
    if finished:
        log.say(f"done: best rSum {trainer.progress.best_rsum:.1f} in {args.logger_name}/{BEST}")
    else:
        log.say(f"stopped and saved; go on with --resume {args.logger_name}")
    return finished


def _first_weights(args: argparse.Namespace) -> dict | None:
    """Return the checkpoint that a new run starts from, None where it starts otherwise."""
    path = get_method(args.method).starts_from(args)
    return None if path is None or args.resume is not None else read_payload(path)


def _model(
    args: argparse.Namespace, tokenizer: WordTokenizer, state: dict | None, start: dict | None
) -> Method:
    """Return the model with the weights of the run that goes on, or of the stage before."""
    set_seed(args.seed)
    model = build_model(args, tokenizer.vocab_size)
    args.image_filter = image_filter(model.image_encoder)  # the loaders, and evaluation, ask for it
    args.text_positions = getattr(model.text_encoder, "max_positions", None)  # the loaders, too
    set_encoders_up(model, args.cached_batch, bool(args.gradient_checkpointing))
    if state is not None:
        load_weights(Path(args.resume) / LAST, model, state["model"])
    if start is not None:
        start_weights(get_method(args.method).starts_from(args), model, start)
    return model


def build_trainer(
    args: argparse.Namespace,
    model: Method,
    tokenizer: WordTokenizer,
    splits: tuple[Split, Split],
    device: torch.device,
    log: RunLog,
    cache: ImageCache | None = None,
    features: FeatureCache | None = None,
) -> Trainer:
    """Return the trainer on `splits` (training, validation), as the flags say."""
    training, validation = splits
    reading = (tokenizer, model.dense_owner, device.type == "cuda", cache)
    batches = training_loader(args, training, *reading, features)
    loaders = pictured = validation_loaders(args, validation, *reading, features)
    if features is not None:  # hidden states are no pictures
        pictured = validation_loaders(args, validation, *reading)
    optimizer = build_optimizer(
        model, args.learning_rate, args.backbone_lr_ratio, args.weight_decay, args.beta2
    )
    if device.type == "cpu":
        keep_freed_memory()
    fault = compile_backbones(model, device) if args.compile else None
    if fault is not None:
        log.say(f"warning: --compile 1: this machine can't compile ({fault}); going on without")
    steps = -(-len(batches) // args.grad_accum)  # of an epoch: its rest is a step too
    with distributed.together():
        drawn = model.uses_pixels and not args.precomp  # regions are no picture
        picture = first_pairs_strip(pictured, validation.captions, device) if drawn else None
    return Trainer(
        model=model,
        optimizer=optimizer,
        schedule=schedule_from_args(args, steps),
        train_batches=batches.batches,
        batches_per_epoch=len(batches),
        pairs_per_batch=args.batch_size * distributed.world_size(),
        image_names=training.image_ids,
        validation=loaders,
        settings=Settings.from_args(args, steps * args.num_epochs),
        device=device,
        log=log,
        writer=CheckpointWriter(args.logger_name),
        picture=picture,
    )


# --- going on with a run -----------------------------------------------------------------------


def _resumed(args: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the run that goes on, flags given now laid over them.

    torchrun's restart of failed workers goes on by itself. Raises InputError where the folder holds
    no run, or where a new run would write over an old one.
    """
    restarted = was_restarted(process_settings(args))
    if args.resume is None and restarted and (Path(args.logger_name) / LAST).exists():
        args.resume = args.logger_name
    elif args.resume is not None:
        check_same_folder(args.resume, given_folder(argv))
    _check_folder(args)
    if args.resume is None:
        return args
    fixed = {"logger_name": args.resume, "resume": args.resume, "overwrite": 0}
    return parse_train(argv, saved_arguments=Path(args.resume) / "args.json", **fixed)


def _check_folder(args: argparse.Namespace) -> None:
    check_folder(args.resume or args.logger_name, args.resume is not None, bool(args.overwrite))


def _saved_state(args: argparse.Namespace, data: dict[str, Any]) -> dict | None:
    """Return the checkpoint to go on from; None starts at the beginning.

    Raises InputError where it is of another method, seed or data set than this call's.
    """
    if args.resume is None:
        return None
    state = load_training_state(Path(args.resume) / LAST)
    differing = fingerprint_differences(state.get("data", data), data)
    check_same_run(args.resume, state, args.method, args.seed, differing)
    return state


if __name__ == "__main__":
    run_program(main)
