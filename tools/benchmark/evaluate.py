"""Evaluation: encoder passes over images, and the time to score COCO 5K, against the field's way.

The field's way encodes the image of every caption, five times each, and keeps every fifth result.
Passes are counted on small encoders, whose number does not depend on their size; scoring is timed
on random tokens at ViT-224, on the CPU on a sample of the 5,000 x 25,000 pairs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lib.batch import Batch, Tokens
from lib.methods.base import Method
from lib.model.precision import autocast_for
from lib.retrieval.evaluation import SplitLoaders, split_similarity
from lib.retrieval.similarity import TEXTS_AT_ONCE, regroup, similarity_matrix
from tools.benchmark.cases import (
    CAPTIONS_PER_IMAGE,
    Case,
    call_of,
    fewer_captions,
    least_work,
    read_texts,
)
from tools.benchmark.loop import LOOPS, PEERS
from tools.benchmark.measure import (
    add_measuring,
    amp_of,
    check_at_least_one,
    chosen_list,
    cuda_peak,
    roofline,
    seconds_of,
    side_by_side,
    torch_device,
)
from tools.benchmark.report import judge
from tools.benchmark.step import StepCase

COCO = (5000, 25000)
SAMPLE = (64, TEXTS_AT_ONCE)  # what a CPU scores of it
BATCH = 64  # eval.py's default
PASSES_BAR = {"share_of_passes": 1 / CAPTIONS_PER_IMAGE}
COCO_SECONDS = 10  # for LAPS at ViT-224 on CUDA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the evaluation and of the measuring."""
    parser.add_argument("--method", default="laps,seps", help="one or both")
    parser.add_argument("--patches", type=int, default=196, help="of the scored images")
    parser.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    whole, part = (" x ".join(f"{one:,}" for one in size) for size in (COCO, SAMPLE))
    told = f"scored, default: {whole} images x captions on CUDA, {part} on the CPU"
    parser.add_argument("--images", type=int, default=None, help=told)
    parser.add_argument("--captions", type=int, default=None, help="see --images")
    parser.add_argument(
        "--loop_captions", type=int, default=None, help="the loop's sample; default: 8 on the CPU"
    )
    parser.add_argument("--loop_images", type=int, default=BATCH, help="that it is given at once")
    parser.add_argument("--encoded", type=int, default=40, help="images whose passes are counted")
    add_measuring(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return two rows a method: passes over images, and scoring."""
    flags = "repeats patches embed_size images captions loop_captions loop_images encoded"
    check_at_least_one(args, *flags.split())
    rows = []
    for method in chosen_list(args.method, "method", tuple(PEERS)):
        print(f"evaluation of {method}", file=sys.stderr, flush=True)
        rows += [passes_row(method, args), scoring_row(method, args)]
    return rows


# --- passes over images --------------------------------------------------------------------------


def passes_row(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return how many images each way puts through the encoder."""
    device = torch_device(args.device)
    sizes = {"encoders": "tiny", "embed_size": 32, "device": args.device, "seed": args.seed}
    case = StepCase(method, "sum", args.encoded, **sizes)
    images, captions = split_inputs(case)
    passes, seconds = {}, {}
    for way, evaluate in (("loop", field_matrix), ("ours", our_matrix)):
        model = case.model(way).eval()
        with counted_images(model) as count:
            call = lambda e=evaluate, m=model: e(m, images, captions)  # noqa: E731
            seconds[way] = seconds_of(call, device)
        passes[way] = count[0]
    row = {
        "name": f"{method} images encoded, {args.encoded} x {CAPTIONS_PER_IMAGE} captions",
        "unit": "images",
        **passes,
        **{f"{way}_seconds": value for way, value in seconds.items()},
    }
    return judge(row, PASSES_BAR)


def split_inputs(case: StepCase) -> tuple[Batch, Batch]:
    """Return images and five captions of each, both with the images' dense texts.

    A method reads them where it owns them.
    """
    images = case.inputs()
    captions = replace(case, batch=case.batch * CAPTIONS_PER_IMAGE).inputs()
    captions.dense_ids = images.dense_ids.repeat_interleave(CAPTIONS_PER_IMAGE, 0)
    captions.dense_lengths = images.dense_lengths.repeat_interleave(CAPTIONS_PER_IMAGE)
    return images, captions


@contextmanager
def counted_images(model: Method) -> Iterator[list[int]]:
    """Count the images that go through the image encoder, in a list of one number."""
    count = [0]

    def add(module: Any, inputs: tuple, output: Tokens) -> None:
        count[0] += len(output)

    handle = model.image_encoder.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def our_matrix(model: Method, images: Batch, captions: Batch) -> np.ndarray:
    """Return the similarity matrix as eval.py computes it."""
    count = len(images.pixels)
    loaders = SplitLoaders(
        images=[image_rows(images, torch.arange(count)[part]) for part in parts_of(count)],
        captions=[caption_rows(captions, part) for part in parts_of(len(captions.ids))],
        caption_images=np.arange(count).repeat(CAPTIONS_PER_IMAGE),
        num_images=count,
    )
    device = images.pixels.device
    return split_similarity(model, loaders, device, autocast_for("off", device), False)


@torch.inference_mode()
def field_matrix(model: Method, images: Batch, captions: Batch) -> np.ndarray:
    """Return the same matrix as the field does: each pair encoded, then every fifth image kept."""
    owner = torch.arange(len(images.pixels)).repeat_interleave(CAPTIONS_PER_IMAGE)
    encoded, texts = [], []
    for part in parts_of(len(owner)):
        encoded.append(model.encode_image_batch(image_rows(images, owner[part])))
        texts.append(model.encode_text_batch(caption_rows(captions, part)))
    every_fifth = Tokens.cat(encoded)[::CAPTIONS_PER_IMAGE]
    return LOOPS[model.name](model, every_fifth, Tokens.cat(texts)).cpu().numpy()


def parts_of(count: int) -> list[slice]:
    """Return slices of at most `BATCH` rows."""
    return [slice(first, first + BATCH) for first in range(0, count, BATCH)]


def image_rows(batch: Batch, rows: torch.Tensor) -> Batch:
    """Return some images with the dense texts that are theirs."""
    rows = rows.to(batch.pixels.device)
    dense = batch.dense_ids[rows], batch.dense_lengths[rows]
    return Batch(pixels=batch.pixels[rows], dense_ids=dense[0], dense_lengths=dense[1])


def caption_rows(batch: Batch, rows: slice) -> Batch:
    """Return some captions, padded to the longest of them."""
    lengths, dense_lengths = batch.lengths[rows], batch.dense_lengths[rows]
    return Batch(
        ids=batch.ids[rows, : int(lengths.max())],
        lengths=lengths,
        dense_ids=batch.dense_ids[rows, : int(dense_lengths.max())],
        dense_lengths=dense_lengths,
    )


# --- scoring -------------------------------------------------------------------------------------


def scoring_row(
    method: str, args: argparse.Namespace, bar: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return how fast COCO 5K is scored, measured whole or on a sample.

    Warmed up is on one block of images with all captions. It is judged by `bar`, where none is
    given by that of COCO 5K on CUDA.
    """
    device = torch_device(args.device)
    whole = scored_case(method, args)
    images, captions = whole.images, whole.captions
    at_once = {"images": min(images, args.loop_images), "captions": min(captions, TEXTS_AT_ONCE)}
    block = replace(whole, **at_once)
    few = min(block.captions, args.loop_captions or (8 if device.type == "cpu" else 1024))
    first, ours = score_all(whole)
    loop = score_block(block, few)
    calls = {"loop": loop, "ours": ours}
    seconds = side_by_side(calls, args.repeats, device, warm_up={"ours": first})
    speed = {"ours": whole.pairs / seconds["ours"], "loop": block.images * few / seconds["loop"]}
    coco = {way: COCO[0] * COCO[1] / value for way, value in speed.items()}
    row = {
        "name": f"{method} scoring, {whole.encoder} real {images}x{captions}",
        "unit": "pairs/s",
        **speed,
        "ours_pairs": whole.pairs,
        "loop_pairs": block.images * few,
        "amp": whole.amp,
        "seconds": coco["ours"],
        "note": f"COCO 5K {'takes' if (images, captions) == COCO else 'would take'} "
        f"{coco['ours']:,.1f} s, with the loop {coco['loop']:,.0f} s "
        f"(from {whole.pairs:,} and {block.images * few:,} pairs)",
    }
    if args.roofline:
        row.update(roofline(least_work(whole), seconds["ours"], device, whole.amp))
    if device.type == "cuda" and args.memory:
        row["ours_memory"] = cuda_peak(first, device)  # other images need no more at a time
        row["loop_memory"] = cuda_peak(loop, device)
    if bar is None:
        barred = device.type == "cuda" and method == "laps" and whole.encoder == "ViT-224"
        whole_coco = (images, captions, args.embed_size) == (*COCO, 512)
        bar = {"seconds": COCO_SECONDS} if barred and whole_coco else {}
    return judge(row, bar)


def scored_case(method: str, args: argparse.Namespace) -> Case:
    """Return what is scored: COCO 5K, or what --images and --captions leave of it."""
    default = SAMPLE if torch_device(args.device).type == "cpu" else COCO
    return Case(
        method=method,
        mode="eval",
        patches=args.patches,
        words=None,
        images=args.images or default[0],
        captions=args.captions or default[1],
        embed_size=args.embed_size,
        device=args.device,
        amp=amp_of(args),
        seed=args.seed,
    )


def score_all(case: Case) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Return the scoring of a first block of images, and of all, with all captions.

    It is lib/retrieval's, on tokens batched as encoding does.
    """
    model, batches = case.model(), {"images": [], "captions": []}
    for side, count in (("images", case.images), ("captions", case.captions)):
        for number, part in enumerate(parts_of(count)):
            size = len(range(count)[part])
            piece = replace(case, **{side: size}, seed=case.seed + number)
            images = side == "images"
            tokens = piece.image_tokens() if images else read_texts(model, piece.text_tokens())
            batches[side].append(tokens)
    autocast = autocast_for(case.amp, torch.device(case.device))
    texts = regroup(batches["captions"], TEXTS_AT_ONCE)

    def score(images: list[Tokens]) -> Callable[[], np.ndarray]:
        return lambda: similarity_matrix(model, images, texts, autocast, case.images)

    return score(batches["images"][:1]), score(batches["images"])


def score_block(case: Case, captions: int) -> Callable[[], torch.Tensor]:
    """Return the loop over some captions of one block of images."""
    texts = fewer_captions(case.text_tokens(), captions)
    return call_of(case, "loop", case.model("loop"), case.image_tokens(), texts)
