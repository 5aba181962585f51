"""Names to methods: `--method` choices, their flags, and building one from arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from lib.errors import InputError
from lib.flags import check_kinds
from lib.methods.base import Method
from lib.methods.encoder_flags import add_encoder_arguments, check_feature_cache, check_freeze
from lib.methods.flags import add_common_arguments
from lib.model.encoders import EncoderSource
from lib.model.losses import GlobalLoss
from lib.ranges import check_ranges

_METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a Method subclass as `--method name`. Raises ValueError where the name is taken."""

    def register(cls: type[Method]) -> type[Method]:
        if name in _METHODS:
            raise ValueError(f"method {name!r} is already registered by {_METHODS[name].__name__}")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return register


def method_names() -> list[str]:
    """Return the registered names in alphabetical order."""
    return sorted(_METHODS)


def get_method(name: str) -> type[Method]:
    """Return the class behind a name. Raises ValueError listing the known ones."""
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    return _METHODS[name]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what building a model needs: the flags methods share, then each method's own."""
    add_common_arguments(parser)
    add_encoder_arguments(parser)
    for name in method_names():
        get_method(name).add_arguments(parser.add_argument_group(f"method {name}"))


def model_parser() -> argparse.ArgumentParser:
    """Return a parser of the model flags alone."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_arguments(parser)
    return parser


def model_defaults() -> argparse.Namespace:
    """Return every model flag at its default, for checkpoints older than a flag."""
    return model_parser().parse_args([])


def check_kept_arguments(values: Mapping[str, Any], source: str) -> None:
    """Raise InputError where a model flag kept in the file `source` is not what the flag takes."""
    check_kinds(model_parser()._actions, values, source)


def flags_unread(name: str) -> set[str]:
    """Return the flags that other methods read and `name` does not."""
    everything = {flag for one in method_names() for flag in _flags_of(one)}
    return everything - _flags_of(name)


def _flags_of(name: str) -> set[str]:
    """Return the flags that not every method reads, and this one does."""
    method, parser = get_method(name), argparse.ArgumentParser(add_help=False)
    method.add_arguments(parser.add_argument_group())
    return {action.dest for action in parser._actions} | set(method.also_reads)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError where flags do not suit `args.method`: what all methods ask, then its own.

    Called before anything is loaded.
    """
    check_ranges(vars(args))
    method = get_method(args.method)
    if args.precomp and not method.accepts_regions:
        able = [name for name in method_names() if get_method(name).accepts_regions]
        raise InputError(
            f"--method {args.method} takes no precomputed regions: leave out --precomp, or "
            f"take one of {', '.join(able)}"
        )
    check_feature_cache(args, method)
    check_freeze(args)
    if args.global_weight and not method.has_global_embedding:
        raise InputError(
            f"--global_weight {args.global_weight}: images and captions of --method {args.method} "
            "share no global embedding; leave it out"
        )
    method.check_arguments(args)


def _wished_positions(args: argparse.Namespace) -> int:
    """Return the word pieces that a text encoder made from scratch should read."""
    method = get_method(args.method)
    if not method.trains_on_dense(args):
        return args.max_word
    return max(args.max_word, method.dense_words(args, training=True))


def build_model(
    args: argparse.Namespace,
    vocab_size: int,
    image_config: dict | None = None,
    text_config: dict | None = None,
) -> Method:
    """Return the untrained model that `args.method` names.

    The backbones come from `args.vit_type`/`args.bert_path`, or with random weights from the given
    configs. Raises InputError where a flag does not suit.
    """
    check_arguments(args)
    source = EncoderSource(
        vit_type=args.vit_type,
        bert_path=args.bert_path,
        embed_size=args.embed_size,
        img_res=args.img_res,
        vocab_size=vocab_size,
        max_word=max(args.max_word, args.max_dense_word or 0),
        positions=_wished_positions(args),
        tiny_width=args.tiny_width,
        tiny_layers=args.tiny_layers,
        tiny_patch_size=args.tiny_patch_size,
        image_config=image_config,
        text_config=text_config,
        region_dim=args.region_dim if args.precomp else None,
        gru=(args.word_dim, args.gru_dropout) if args.text_encoder == "gru" else None,
        image_norm=args.image_norm,
        image_cls=bool(args.image_cls),
        freeze=args.freeze,
        lora_rank=args.lora_rank,
        pad_id=getattr(args, "pad_id", 0),  # of the tokenizer that the program read
    )
    model = get_method(args.method).from_args(args, source)
    if model.criterion.loss == "trip":
        if model.score_range is None:
            raise InputError(
                f"--loss trip reads distances from the scores, and those of --method {args.method} "
                "have no bounds with these flags: give --loss vse or infonce"
            )
        model.criterion.score_range = model.score_range
    if args.global_weight:
        model.global_loss = GlobalLoss(args.global_weight, args.global_loss, args.margin)
    return model
