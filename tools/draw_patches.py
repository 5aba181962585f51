"""Draw images, their captions and the patches kept for each: python -m tools.draw_patches."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from data import read_split, validation_loaders
from lib.batch import Batch
from lib.checkpoints.checkpoint import restore_model
from lib.checkpoints.payloads import read_payload
from lib.errors import InputError
from lib.files import check_destination, write_bytes_whole
from lib.flags import IntegerList, Parser
from lib.methods.base import Method
from lib.program import program, run_program
from lib.retrieval.pictures import beside, kept_overlay, rgb_image, with_caption
from vocab import checkpoint_tokenizer

SIDE = 224


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture; return the exit code."""
    parser = Parser("tools.draw_patches", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="whose model chooses the patches")
    parser.add_argument("--out", default="imgs/kept_patches.png", help="the picture, .png or .jpg")
    parser.add_argument("--split", default="test", choices=["dev", "test"], help="of which split")
    parser.add_argument(
        "--images",
        action=IntegerList,
        default=[0, 5],
        metavar="ROW",
        help="rows of the split, a line each",
    )
    parser.add_argument("--captions", type=int, default=4, help="captions shown of each image")
    parser.add_argument("--method", default=None, help="of an official checkpoint")
    parser.add_argument("--vit_path", default=None, help="folder with the image config.json")
    parser.add_argument("--bert_path", default=None, help="folder with BERT's config")
    return _write(parser.parse_args(argv))


def _write(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"--out {out}: end the name in .png or .jpg")
    check_destination(out, "--out", make_folder=True)
    pixels = cv2.cvtColor(draw(args), cv2.COLOR_RGB2BGR)
    write_bytes_whole(out, cv2.imencode(out.suffix, pixels)[1].tobytes())
    print(f"written to {out}")
    return 0


def draw(args: argparse.Namespace) -> np.ndarray:
    """Return the picture: a line an image, the image first, then what each caption keeps."""
    payload = read_payload(args.checkpoint)
    paths = args.vit_path, args.bert_path
    model, trained = restore_model(args.checkpoint, payload, args.method, *paths)
    tokenizer = checkpoint_tokenizer(payload, args.bert_path or trained.bert_path)
    split = read_split(trained, args.split, needs_dense=model.dense_owner is not None)
    loaders = validation_loaders(trained, split, tokenizer, model.dense_owner, pin=False)
    lines = []
    for row in args.images:
        if not 0 <= row < loaders.num_images:
            raise InputError(f"--images {row}: the split has {loaders.num_images} images, from 0")
        columns = np.flatnonzero(split.caption_image == row)[: args.captions].tolist()
        image = loaders.images.first([row])
        texts = loaders.captions.first(columns)
        kept = kept_for(model, image, texts)
        source = rgb_image(image.pixels[0])
        grid = model.image_encoder.grid
        whole = kept_overlay(source, np.ones(kept.shape[1], bool), grid, SIDE)
        pictures = [with_caption(whole, f"image {split.image_ids[row]}")]
        pictures += [
            with_caption(kept_overlay(source, mask, grid, SIDE), split.captions[column])
            for mask, column in zip(kept, columns, strict=True)
        ]
        lines.append(beside(pictures))
    width = max(line.shape[1] for line in lines)
    padded = [
        np.pad(line, ((8, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255)
        for line in lines
    ]
    return np.concatenate(padded)


@torch.inference_mode()
def kept_for(model: Method, image: Batch, texts: Batch) -> np.ndarray:
    """Return the patches kept of one image for each caption, bool (captions, L)."""
    kept = model.kept_patches(model.encode_image_batch(image), model.encode_text_batch(texts))
    if kept is None:
        raise InputError(f"--method {model.name} uses all patches: there is nothing to draw")
    return kept[0].numpy()


if __name__ == "__main__":
    run_program(main)
