"""The command line of train.py and eval.py: flags of the LAPS family, plus each method's own."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lib.batch import image_size
from lib.config_file import with_config
from lib.data.flags import add_data_flags, add_training_data_flags
from lib.data.layout import image_folder
from lib.data.splits import HELD_OUT
from lib.errors import InputError, InputWarning
from lib.files import load_object
from lib.flags import Parser, check_kinds, given_flags
from lib.memory import check_fits
from lib.methods import registry
from lib.model.selection import CONTROLS
from lib.ranges import check_ranges
from lib.retrieval.flags import add_result_flags, add_way_flags, check_evaluation, check_labels
from lib.training.flags import add_amp_flag, add_optimizer_flags, add_training_flags
from lib.training.trackers import tracker_names

# What a data set changes in the defaults, for any other nothing; a flag given always wins.
DATASET_DEFAULTS = {
    "scenes": {
        "vit_type": "tiny",
        "bert_path": "tiny",
        "img_res": 112,
        "tiny_patch_size": 8,
        "tiny_layers": 1,
        "image_cls": 0,
        "image_score": "distinct",
        "sibling_share": 0.2,
        "embed_size": 64,
        "sim_dim": 64,
        "batch_size": 64,
        "num_epochs": 2,
        "learning_rate": 2e-3,
        "backbone_lr_ratio": 1.0,
        "lr_policy": "cosine",
        "lr_warmup_steps": 50,
        "beta2": 0.98,
        "vse_mean_warmup_epochs": 1000,
        "embedding_warmup_epochs": -1,
        "warmup": 600,
        "size_augment": 0,
        "image_augment": 0,
        "workers": 2,
        "val_step": 1000000,
        "logger_name": "runs/scenes",
    },
}


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--logger_name", default="runs/test", help="folder of this run")
    _add_gpu(group)
    group.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    group.add_argument("--resume", default=None, metavar="FOLDER", help="go on with this run")
    group.add_argument(
        "--overwrite", type=int, default=0, help="1: start anew in a folder that holds a run"
    )
    group.add_argument(
        "--log_step",
        type=int,
        default=0,
        help="steps between log entries; 0: a run has about 100, or one in 200 steps",
    )
    group.add_argument(
        "--report_to",
        default="tensorboard",
        metavar="NAMES",
        help="where curves go: tensorboard, wandb, trackio, several with commas, or none",
    )
    group.add_argument("--val_step", type=int, default=500, help="steps between validations")
    group.add_argument("--save_step", type=int, default=1000, help="steps between checkpoints")


def _add_gpu(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpu-id", "--gpu_id", dest="gpu_id", type=int, default=0, help="CUDA device, from 0"
    )


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes")
    group.add_argument("--multi_gpu", type=int, default=0, help="1: one process per GPU")
    group.add_argument("--world_size", type=int, default=1, help="processes in all")
    group.add_argument("--rank", type=int, default=0, help="number of this process")
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="the same on this machine"
    )
    group.add_argument("--dist_backend", default="nccl", help="gloo is taken where no GPU is")
    group.add_argument(
        "--dist_url",
        default="env://",
        help="tcp://HOST:PORT of rank 0; goes before MASTER_ADDR and MASTER_PORT",
    )
    group.add_argument(
        "--dist_timeout",
        type=float,
        default=600.0,
        help="seconds that processes wait for each other; who is missing is told at once",
    )


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--save_results", type=int, default=1, help="1: write results.json beside the checkpoint"
    )
    add_result_flags(group)


def _add_final_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation at the end")
    group.add_argument(
        "--eval", type=int, default=0, help="1: evaluate the best checkpoint on test when done"
    )
    _add_results(group)


def _add_method(parser: argparse.ArgumentParser, default: str) -> None:
    names = registry.method_names()
    parser.add_argument(
        "--method",
        default=None,
        choices=names,
        metavar="NAME",
        help=f"{', '.join(names)} (default: {default})",
    )


def train_parser() -> Parser:
    """Return the parser of train.py."""
    parser = Parser("train.py", description="Train an image-text retrieval model.", raises=True)
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML file of flags, as those in recipes/; flags given besides win",
    )
    _add_method(parser, "seps")
    for add in (
        add_data_flags,
        add_training_data_flags,
        _add_run,
        add_training_flags,
        add_optimizer_flags,
        _add_final_evaluation,
        _add_distributed,
        registry.add_model_arguments,
    ):
        add(parser)
    return parser


def eval_parser() -> Parser:
    """Return the parser of eval.py; what the model is made of comes from the checkpoint."""
    parser = Parser("eval.py", description="Evaluate checkpoints.", raises=True)
    _add_method(parser, "the checkpoint's; official ones need laps, seps_released or ilaps")
    add_data_flags(parser)
    parser.set_defaults(dataset=None, scenes_size=None)  # the checkpoint's own, where not given
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--checkpoint",
        default=None,
        help="a model_best.pth, ours or an official one, a model's or run's folder, or a hub id; "
        "default: every runs/{dataset}_* folder",
    )
    group.add_argument("--vit_path", default=None, help="folder with the image config.json")
    group.add_argument("--bert_path", default=None, help="folder with BERT's config and vocabulary")
    group.add_argument("--split", default="test", choices=["test", "dev"], help="what to rank")
    group.add_argument(
        "--first_images",
        type=int,
        default=0,
        metavar="N",
        help="rank only the first N images of the split with their captions (0: all); the result "
        "is stored under its own name",
    )
    group.add_argument("--batch_size", type=int, default=64, help="images or captions at once")
    group.add_argument(
        "--shard_size", type=int, default=None, help="pairs at once; default: as in training"
    )
    add_amp_flag(group)
    _add_gpu(group)
    group.add_argument(
        "--selection_control",
        default=None,
        choices=CONTROLS,
        help="instead of the patches that the model chooses keep as many at random, or those it "
        "likes least, to see what its choice is worth; the result is stored under its own name",
    )
    group.add_argument("--runs", default="runs", help="folder searched without --checkpoint")
    _add_results(group)
    group.add_argument(
        "--save_similarity", default=None, metavar="FILE", help="also write the matrix (.npy)"
    )
    add_way_flags(group)
    _add_distributed(parser)
    return parser


def parse_train(
    argv: Sequence[str] | None = None,
    saved_arguments: str | os.PathLike | None = None,
    **fixed,
) -> argparse.Namespace:
    """Return train.py's arguments, the data set's defaults applied, and checked.

    With `saved_arguments` (a run's args.json) what that run used takes the place of the defaults,
    held out images as its --val_split too, which no command line can ask for.
    `fixed` values win over everything. Raises InputError for values that contradict each other or
    are out of range.
    """
    parser = train_parser()
    argv = with_config(parser, sys.argv[1:] if argv is None else argv)
    first, _ = parser.parse_known_args(argv)
    if saved_arguments is None:
        own = registry.get_method(first.method or "seps").defaults(first)
        dataset = own.get("dataset", first.dataset)
        parser.set_defaults(**{**DATASET_DEFAULTS.get(dataset, {}), **own})
    else:
        saved = load_object(saved_arguments)
        kinds = {k: v for k, v in saved.items() if (k, v) != ("val_split", HELD_OUT)}
        check_kinds(parser._actions, kinds, str(saved_arguments))
        parser.set_defaults(**{k: v for k, v in saved.items() if k != "resume"})
    args = parser.parse_args(argv)
    vars(args).update(fixed)
    args.method = args.method or "seps"
    fill_paths(args)
    check_train(args)
    return args


def warn_of_unread_flags(argv: Sequence[str] | None, method: str) -> None:
    """Warn of flags on train.py's command line, or in its --config, that only others read."""
    argv = with_config(train_parser(), sys.argv[1:] if argv is None else argv)
    given = given_flags(train_parser(), argv)
    unread = registry.flags_unread(method)
    flags = [f"--{flag}" for flag in given if flag in unread]
    if flags:
        verb = "is" if len(flags) == 1 else "are"
        told = f"{', '.join(flags)} {verb} not read by --method {method}"
        warnings.warn(told, InputWarning, stacklevel=2)


def given_folder(argv: Sequence[str] | None = None) -> str | None:
    """Return train.py's --logger_name where the command line has one, None where it does not."""
    parser = train_parser()
    parser.set_defaults(logger_name=None)
    argv = with_config(parser, sys.argv[1:] if argv is None else argv)
    return parser.parse_known_args(argv)[0].logger_name


def parse_eval(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return eval.py's arguments. Raises InputError for flags that contradict each other."""
    args = eval_parser().parse_args(argv)
    fill_paths(args)
    check_evaluation(args)
    return args


def final_evaluation(args: argparse.Namespace) -> argparse.Namespace:
    """Return eval.py's arguments for the best checkpoint of a run that train.py has ended."""
    found = parse_eval(["--checkpoint", os.path.join(args.logger_name, "model_best.pth")])
    # the checkpoint's own, and a flag that means something else there
    apart = {"method", "bert_path", "shard_size", "shards"}
    shared = vars(found).keys() & vars(args).keys() - apart
    vars(found).update({name: getattr(args, name) for name in shared})
    return found


def fill_paths(args: argparse.Namespace) -> None:
    """Set the image folders that were not given: flickr30k-images and coco-images in data_path."""
    if args.f30k_img_path is None:
        args.f30k_img_path = os.path.join(args.data_path, "flickr30k-images")
    if args.coco_img_path is None:
        args.coco_img_path = os.path.join(args.data_path, "coco-images")


def process_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `lib.distributed.start_processes` takes."""
    return {
        "multi_gpu": bool(args.multi_gpu),
        "gpu_id": args.gpu_id,
        "world": args.world_size,
        "this_rank": args.rank,
        "local_rank": args.local_rank,
        "backend": args.dist_backend,
        "url": args.dist_url,
        "seconds": args.dist_timeout,
    }


def image_path(args: argparse.Namespace) -> str:
    """Return the image folder of `args.dataset`."""
    given = getattr(args, "image_path", None)  # absent from checkpoints of before it was there
    own = getattr(args, f"{args.dataset}_img_path", None)
    return given or own or str(image_folder(args.data_path, args.dataset))


def check_train(args: argparse.Namespace) -> None:
    """Raise InputError for flag values that can't work, before anything is loaded."""
    check_ranges(vars(args))
    if len(args.scenes_size) != 3:
        raise InputError("--scenes_size: give three numbers, train, dev and test")
    tracker_names(args.report_to)
    check_labels(args)
    registry.check_arguments(args)
    check_fits(batch_bytes(args), "a batch with its similarities")


def batch_bytes(args: argparse.Namespace) -> dict[str, float]:
    """Return the bytes that a training batch takes at least, by the flag that asks for them."""
    height, width = (1, 1) if args.precomp else image_size(args.img_res)
    named = f"--batch_size {args.batch_size}"
    if height * width > args.batch_size:
        named = f"--img_res {args.img_res}"
    return {named: args.batch_size * (3.0 * height * width + 4.0 * args.batch_size)}
