"""The command line of train.py and eval.py: flags of the LAPS family, plus each method's own."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from lib.data.layout import image_folder
from lib.errors import InputError
from lib.methods import registry

# What a data set changes in the defaults, for any other nothing; a flag given always wins.
DATASET_DEFAULTS = {
    "scenes": {
        "vit_type": "tiny",
        "bert_path": "tiny",
        "img_res": 96,
        "embed_size": 64,
        "batch_size": 64,
        "num_epochs": 5,
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
        "log_step": 20,
        "val_step": 1000000,
        "logger_name": "runs/scenes",
    },
}


def int_list(text: str) -> list[int]:
    """Return the integers of a comma-separated list; an empty text gives none."""
    return [int(part) for part in text.replace("[", "").replace("]", "").split(",") if part.strip()]


def _add_data(parser: argparse.ArgumentParser) -> None:
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
        "--size_augment", type=int, default=1, help="mask, replace and drop words in training"
    )
    group.add_argument(
        "--image_augment", type=int, default=1, help="random crop and flip in training"
    )
    group.add_argument(
        "--val_split",
        default="dev",
        choices=["dev", "test"],
        help="split that chooses the checkpoint; test is the official habit, and is recorded",
    )
    group.add_argument(
        "--max_bad_images", type=int, default=100, help="stop after more undecodable images"
    )
    group.add_argument(
        "--scenes_size",
        type=int_list,
        default=[4000, 200, 200],
        help="train,dev,test images of the embedded data set",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--logger_name", default="runs/test", help="folder of this run")
    group.add_argument("--gpu-id", dest="gpu_id", type=int, default=0, help="CUDA device number")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--resume", default=None, metavar="FOLDER", help="go on with this run")
    group.add_argument(
        "--overwrite", type=int, default=0, help="1: start anew in a folder that holds a run"
    )
    group.add_argument("--log_step", type=int, default=200, help="steps between log entries")
    group.add_argument("--val_step", type=int, default=500, help="steps between validations")
    group.add_argument("--save_step", type=int, default=1000, help="steps between checkpoints")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=int, default=128, help="pairs per process")
    group.add_argument("--num_epochs", type=int, default=30)
    group.add_argument("--max_violation", action="store_true", help="hardest negative throughout")
    group.add_argument(
        "--vse_mean_warmup_epochs",
        type=int,
        default=1,
        help="epochs with the sum over negatives, before the hardest negative",
    )
    group.add_argument(
        "--embedding_warmup_epochs",
        type=int,
        default=0,
        help="number of the epoch over which the alignment loss rises from 0 (-1: none)",
    )
    group.add_argument("--grad_accum", type=int, default=1, help="batches per optimizer step")
    group.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    group.add_argument("--compile", type=int, default=0, help="torch.compile the backbones")
    group.add_argument(
        "--skip_nonfinite", type=int, default=0, help="tolerated non-finite steps in a row"
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=float, default=2e-4)
    group.add_argument("--backbone_lr_ratio", type=float, default=0.1)
    group.add_argument("--weight_decay", type=float, default=1e-4)
    group.add_argument("--beta2", type=float, default=0.999, help="AdamW's second beta")
    group.add_argument("--grad_clip", type=float, default=2.0, help="gradient norm; 0: no limit")
    group.add_argument("--lr_policy", default="step", choices=["step", "cosine"])
    group.add_argument(
        "--lr_schedules", type=int_list, default=[9, 15, 20, 25], help="epochs of step decay"
    )
    group.add_argument("--decay_rate", type=float, default=0.3, help="factor of step decay")
    group.add_argument("--lr_warmup_steps", type=int, default=0)


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes")
    group.add_argument("--multi_gpu", type=int, default=0, help="1: one process per GPU")
    group.add_argument("--world_size", type=int, default=1)
    group.add_argument("--rank", type=int, default=0)
    group.add_argument("--local_rank", "--local-rank", type=int, default=0)
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


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method", default=None, choices=registry.method_names(), help="default: seps"
    )


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of train.py."""
    parser = argparse.ArgumentParser("train.py", description="Train an image-text retrieval model.")
    _add_method(parser)
    for add in (_add_data, _add_run, _add_training, _add_optimizer, _add_distributed):
        add(parser)
    registry.add_model_arguments(parser)
    return parser


def eval_parser() -> argparse.ArgumentParser:
    """Return the parser of eval.py; what the model is made of comes from the checkpoint."""
    parser = argparse.ArgumentParser("eval.py", description="Evaluate checkpoints.")
    _add_method(parser)
    _add_data(parser)
    parser.set_defaults(dataset=None, scenes_size=None)  # the checkpoint's own, where not given
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--checkpoint",
        default=None,
        help="a model_best.pth, ours or an official one; default: every runs/{dataset}_* folder",
    )
    group.add_argument("--vit_path", default=None, help="folder with the image config.json")
    group.add_argument("--bert_path", default=None, help="folder with BERT's config and vocabulary")
    group.add_argument("--split", default="test", choices=["test", "dev"])
    group.add_argument("--batch_size", type=int, default=64, help="images or captions at once")
    group.add_argument("--shard_size", type=int, default=None, help="as in training")
    group.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    group.add_argument("--gpu-id", dest="gpu_id", type=int, default=0)
    group.add_argument("--runs", default="runs", help="folder searched without --checkpoint")
    group.add_argument(
        "--save_results", type=int, default=1, help="write results.json beside the checkpoint"
    )
    group.add_argument(
        "--save_similarity", default=None, metavar="FILE", help="also write the matrix (.npy)"
    )
    _add_distributed(parser)
    return parser


def parse_train(
    argv: Sequence[str] | None = None,
    saved_arguments: str | os.PathLike | None = None,
    **fixed,
) -> argparse.Namespace:
    """Return train.py's arguments, the data set's defaults applied, and checked.

    With `saved_arguments` (a run's args.json) what that run used takes the place of the defaults.
    `fixed` values win over everything. Raises InputError for values that contradict each other or
    are out of range.
    """
    parser = train_parser()
    first, _ = parser.parse_known_args(argv)
    if saved_arguments is None:
        parser.set_defaults(**DATASET_DEFAULTS.get(first.dataset, {}))
    else:
        saved = _saved_flags(saved_arguments)
        parser.set_defaults(**{k: v for k, v in saved.items() if k != "resume"})
    args = parser.parse_args(argv)
    vars(args).update(fixed)
    args.method = args.method or "seps"
    fill_paths(args)
    check_train(args)
    return args


def _saved_flags(path: str | os.PathLike) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the run's arguments can't be read ({error})") from None


def parse_eval(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return eval.py's arguments."""
    args = eval_parser().parse_args(argv)
    fill_paths(args)
    return args


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


AT_LEAST_ONE = """batch_size num_epochs grad_accum log_step val_step save_step embed_size img_res
shard_size tiny_width tiny_layers tiny_patch_size relevance_topk region_dim""".split()
AT_LEAST_ZERO = """workers gpu_id max_dense_word skip_nonfinite max_bad_images weight_decay margin
lr_warmup_steps backbone_lr_ratio ratio_weight grad_clip""".split()
ABOVE_ZERO = ("learning_rate", "gumbel_tau", "decay_rate", "dist_timeout")


def check_train(args: argparse.Namespace) -> None:
    """Raise InputError for flag values that can't work, before anything is loaded."""
    _check_range(args, AT_LEAST_ONE, lambda value: value >= 1, "of at least 1")
    _check_range(args, AT_LEAST_ZERO, lambda value: value >= 0, "of at least 0")
    _check_range(args, ABOVE_ZERO, lambda value: value > 0, "above 0")
    _check_range(args, ["beta2"], lambda value: 0 <= value < 1, "in [0, 1)")
    _check_range(args, ["max_word"], lambda value: value >= 3, "of at least 3: [CLS], word, [SEP]")
    if len(args.scenes_size) != 3:
        raise InputError("--scenes_size: give three numbers, train,dev,test")
    registry.check_arguments(args)


def _check_range(
    args: argparse.Namespace, flags: Sequence[str], fits: Callable[[float], bool], told: str
) -> None:
    for flag in flags:
        value = getattr(args, flag)
        if not fits(value):
            name = "gpu-id" if flag == "gpu_id" else flag
            raise InputError(f"--{name} {value}: give a number {told}")
