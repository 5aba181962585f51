"""Train a model: python train.py --dataset f30k --logger_name runs/f30k_vit …; see README.md."""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, which takes seconds
    from lib.program import prepare_terminal

    prepare_terminal()

import os

# read when torch loads: OpenMP threads that spin for long slow a busy CPU many times down
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from arguments import parse_train, process_settings, warn_of_unread_flags
from data import (
    load_splits,
    open_features,
    open_image_cache,
    prepare_scenes,
    training_loader,
    validation_loaders,
)
from lib import distributed
from lib.checkpoints.checkpoint import (
    BEST,
    LAST,
    load_training_state,
    load_weights,
    model_payload,
    save_payload,
)
from lib.data.features import FeatureCache
from lib.data.image_cache import ImageCache
from lib.data.splits import Split
from lib.errors import InputError, NonFiniteError
from lib.methods.base import Method
from lib.methods.registry import build_model
from lib.model.encoders import image_filter
from lib.program import INTERRUPTED, program, run_program, warnings_told
from lib.rendezvous import environment_integer, peers_told
from lib.retrieval.pictures import first_pairs_strip
from lib.training.engine import Settings, Trainer
from lib.training.logs import RunLog, clear_run
from lib.training.optim import build_optimizer, schedule
from lib.training.setup import compile_backbones, recompute_backbones, set_seed
from vocab import (
    CaptionTokenizer,
    WordTokenizer,
    learn_vocabulary,
    learn_words,
    load_tokenizer,
)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; return the exit code.

    0: done, 1: the system failed the run (disk, memory, a process), 2: bad input, 3: a loss was not
    finite, 130: a signal stopped the run after saving.
    """
    args = parse_train(argv)
    args = _arguments_of_resumed(args, argv)
    warn_of_unread_flags(argv, args.method)
    with peers_told():
        finished = run(args)
    distributed.stop()  # after an error the other processes may still be waiting for this one
    return 0 if finished else INTERRUPTED


def run(args: argparse.Namespace) -> bool:
    """Train from parsed arguments; return False where a signal stopped it early."""
    device = distributed.start_processes(**process_settings(args))
    if args.overwrite and args.resume is None:
        clear_run(args.logger_name, (LAST, BEST))
    log = RunLog(args.logger_name, active=distributed.is_main())
    try:
        with warnings_told(log.say):
            return _run(args, device, log)
    except (InputError, NonFiniteError, OSError) as error:
        log.say(f"stopped: {error}")
        raise
    finally:
        log.close()


def _run(args: argparse.Namespace, device: torch.device, log: RunLog) -> bool:
    log.say(f"{args.method} on {args.dataset}, {distributed.device_name(device)}")
    cache = open_image_cache(args)
    prepare_scenes(args)
    training, validation = load_splits(args, log)
    tokenizer = training_tokenizer(args, training, validation)
    state = _saved_state(args)
    model = _model(args, tokenizer, state, device)
    read = [(training, bool(args.image_augment)), (validation, False)]
    features = open_features(args, model.image_encoder, read, device, log.say)
    splits = training, validation
    trainer = build_trainer(args, model, tokenizer, splits, device, log, cache, features)
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


def training_tokenizer(
    args: argparse.Namespace, training: Split, validation: Split | None = None
) -> WordTokenizer:
    """Return the tokenizer of --bert_path; for tiny and a GRU, a vocabulary learnt from texts.

    A GRU's words are those of the training captions and, as in SCAN, of dev's where dev chooses.
    """
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


def _model(
    args: argparse.Namespace, tokenizer: WordTokenizer, state: dict | None, device: torch.device
) -> Method:
    """Return the model on its device, with the weights of the run that goes on."""
    set_seed(args.seed)
    model = build_model(args, tokenizer.vocab_size).to(device)
    args.image_filter = image_filter(model.image_encoder)  # the loaders, and evaluation, ask for it
    if args.gradient_checkpointing:
        recompute_backbones(model)
    if state is not None:
        load_weights(Path(args.resume) / LAST, model, state["model"])
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
    if args.compile:
        compile_backbones(model)
    drawn = model.uses_pixels and not args.precomp  # regions are no picture
    return Trainer(
        model=model,
        optimizer=optimizer,
        schedule=schedule(
            args.lr_policy,
            -(-len(batches) // args.grad_accum),  # the rest of an epoch is a step too
            args.num_epochs,
            args.lr_schedules,
            args.decay_rate,
            args.lr_warmup_steps,
        ),
        train_batches=batches.batches,
        batches_per_epoch=len(batches),
        pairs_per_batch=args.batch_size * distributed.world_size(),
        image_names=training.image_ids,
        validation=loaders,
        settings=Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__}),
        device=device,
        log=log,
        save=_saver(args, tokenizer, device),
        picture=first_pairs_strip(pictured, validation.captions, device) if drawn else None,
    )


def _saver(
    args: argparse.Namespace, tokenizer: WordTokenizer, device: torch.device
) -> Callable[[str, Trainer], None]:
    """Return what writes a checkpoint into the run folder; every rank calls it."""

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

    return save


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


# --- going on with a run -----------------------------------------------------------------------


def _arguments_of_resumed(
    args: argparse.Namespace, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Return the arguments of the run that goes on, flags given now laid over them.

    torchrun's restart of failed workers goes on by itself. Raises InputError where the folder holds
    no run, or where a new run would write over an old one.
    """
    folder = Path(args.logger_name)
    restarted = (environment_integer("TORCHELASTIC_RESTART_COUNT") or 0) > 0
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
    run_program(main)
