"""Draw images, their captions and the patches kept for each: python -m tools.draw_patches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from arguments import image_path
from data import EvalCaptions, EvalImages, caption_loader, image_loader, load_split
from eval import checkpoint_tokenizer
from lib.checkpoint import load_model
from lib.errors import InputError
from lib.methods.base import Method
from lib.pictures import beside, kept_overlay, rgb_image, with_caption

SIDE = 224


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture; return the exit code."""
    parser = argparse.ArgumentParser("tools.draw_patches", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", default="imgs/kept_patches.png")
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--images", default="0,5", help="rows of the split, a line each")
    parser.add_argument("--captions", type=int, default=4, help="captions shown of each image")
    parser.add_argument("--method", default=None)
    parser.add_argument("--vit_path", default=None)
    parser.add_argument("--bert_path", default=None)
    args = parser.parse_args(argv)
    try:
        picture = draw(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(args.out, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    print(f"written to {args.out}")
    return 0


def draw(args: argparse.Namespace) -> np.ndarray:
    """Return the picture: a line an image, the image first, then what each caption keeps."""
    model, trained = load_model(args.checkpoint, args.method, args.vit_path, args.bert_path)
    tokenizer = checkpoint_tokenizer(args.checkpoint, args, trained)
    owner = model.dense_owner
    split = load_split(
        trained.data_path, trained.dataset, args.split, image_path(trained), owner is not None
    )
    dense_words = trained.max_dense_word or trained.max_word
    images = EvalImages(
        split, trained.img_res, tokenizer, dense_words if owner == "image" else None
    )
    captions = EvalCaptions(
        split, tokenizer, trained.max_word, dense_words if owner == "caption" else None
    )
    lines = []
    for row in (int(one) for one in args.images.split(",")):
        if not 0 <= row < len(images):
            raise InputError(f"--images {row}: the split has {len(images)} images, from 0")
        columns = np.flatnonzero(split.caption_image == row)[: args.captions].tolist()
        image = next(iter(image_loader(images, 1, [row])))
        texts = next(iter(caption_loader(captions, len(columns), columns)))
        kept = kept_for(model, image, texts)
        source = rgb_image(image.pixels[0])
        whole = kept_overlay(source, np.ones(kept.shape[1], bool), SIDE)
        pictures = [with_caption(whole, f"image {split.image_ids[row]}")]
        pictures += [
            with_caption(kept_overlay(source, mask, SIDE), split.captions[column])
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
def kept_for(model: Method, image, texts) -> np.ndarray:
    """Return the patches kept of one image for each caption, bool (captions, L)."""
    tokens = model.encode_images(image.pixels, image.dense_ids, image.dense_lengths)
    words = model.encode_texts(texts.ids, texts.lengths, texts.dense_ids, texts.dense_lengths)
    kept = model.kept_patches(tokens, words)
    if kept is None:
        raise InputError(f"--method {model.name} uses all patches: there is nothing to draw")
    return kept[0].numpy()


if __name__ == "__main__":
    sys.exit(main())
