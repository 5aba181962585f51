"""Small models and random inputs that several tests share."""

from __future__ import annotations

import argparse

import torch

from lib.batch import Tokens, length_mask
from lib.methods.registry import build_model, get_method, model_defaults

VOCABULARY = 120
# What a method's contract is tested with where its defaults hide a part: HREM's instance relations
# begin after thousands of steps; AVSE's training is random, and so differs between processes.
D2S_STAGE_2 = {
    "distill": True,
    "weight_path": "stage1/model_best.pth",  # train.py reads it, no model
    "use_decoder": True,
    "d2s_dropout": 0.0,
    "size_augment": 0,
}
METHOD_FLAGS = {
    "hrem": {"warmup": 0, "hrem_loss": "vse"},
    "d2s": D2S_STAGE_2,
    "d2s_released": D2S_STAGE_2,
    "sgr": {"sgraf_dropout": 0.0},
    "saf": {"sgraf_dropout": 0.0},
    "avse": {"avse_keep_train": 1.0, "avse_dropout": 0.0, "size_augment": 0},
}


def tiny_args(method: str = "seps", **flags) -> argparse.Namespace:
    """Arguments of a model small enough for a unit test: 16 patches of 8 px, 32 channels."""
    args = model_defaults()
    vars(args).update(
        method=method,
        dataset="f30k",
        seed=0,
        vit_type="tiny",
        bert_path="tiny",
        img_res=32,
        embed_size=32,
        tiny_width=32,
        tiny_layers=1,
        tiny_patch_size=8,
        max_word=40,
        shard_size=4,
    )
    vars(args).update(METHOD_FLAGS.get(method, {}))
    vars(args).update(flags)
    return args


def tiny_model(method: str = "seps", seed: int = 0, **flags):
    """An untrained tiny model; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return build_model(tiny_args(method, **flags), VOCABULARY)


def pair_inputs(
    pairs: int = 6, method: str = "seps", seed: int = 0, longest: int = 9, **flags
) -> dict:
    """Keyword arguments of `training_losses` for random pairs; two of them share an image id."""
    args = tiny_args(method, **flags)
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    inputs = {
        "pixels": integers(0, 256, (pairs, 3, 32, 32)).to(torch.uint8),
        "ids": integers(5, VOCABULARY, (pairs, longest)),
        "lengths": integers(3, longest + 1, (pairs,)),
        "image_ids": torch.arange(pairs),
    }
    inputs["image_ids"][-1] = inputs["image_ids"][0]
    inputs["pixels"][-1] = inputs["pixels"][0]
    if get_method(method).trains_on_dense(args):
        inputs["dense_ids"] = integers(5, VOCABULARY, (pairs, longest + 6))
        inputs["dense_lengths"] = integers(4, longest + 7, (pairs,))
        inputs["dense_ids"][-1] = inputs["dense_ids"][0]
        inputs["dense_lengths"][-1] = inputs["dense_lengths"][0]
    return inputs


def untied_inputs(pairs: int = 6, method: str = "seps", **settings) -> dict:
    """`pair_inputs`, for HREM with two pictures of the image that two pairs share.

    One picture twice ties at its threshold, and rounding then says which of the two is connected.
    """
    inputs = pair_inputs(pairs, method, **settings)
    if method == "hrem":
        inputs["pixels"][-1] = inputs["pixels"][-1].flip(-1)
    return inputs


def encode(model, inputs: dict) -> tuple[Tokens, Tokens]:
    """Tokens of the images and captions of `pair_inputs`."""
    dense = (inputs.get("dense_ids"), inputs.get("dense_lengths"))
    nothing = (None, None)
    images = model.encode_images(
        inputs["pixels"], *(dense if model.dense_owner == "image" else nothing)
    )
    texts = model.encode_texts(
        inputs["ids"],
        inputs["lengths"],
        *(dense if model.dense_owner == "caption" else nothing),
    )
    return images, texts


def random_tokens(
    rows: int, width: int, channels: int, seed: int, *, ragged: bool = False, cls: bool = False
) -> Tokens:
    """Random float64 tokens with gradient; `ragged` rows have 1 to `width` real tokens."""
    generator = torch.Generator().manual_seed(seed)
    local = torch.randn(rows, width, channels, generator=generator, dtype=torch.float64)
    lengths = torch.full((rows,), width)
    if ragged:
        lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    head = None
    if cls:
        head = torch.randn(rows, 1, channels, generator=generator, dtype=torch.float64)
        head.requires_grad_()
    return Tokens(local.requires_grad_(), length_mask(lengths, width), head)
