"""Where the time of an epoch and of an evaluation goes, with frozen image features.

Image features are made, as --feature_cache would hand them over; the text encoder is a BERT of
--text_layers x --text_width with random weights, which takes as long with any. A training step is
taken apart at the tokens: text encoder forward and backward, image head (the projection) forward
and backward, similarity with loss and backward, optimizer. The bar: the similarity takes less time
than the text encoder. Some steps, captions and pairs are measured, the rest is by proportion.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib.batch import Batch, Tokens
from lib.errors import InputError
from lib.methods.base import Method
from lib.methods.registry import build_model, model_defaults
from lib.model.precision import autocast_for
from lib.retrieval.similarity import TEXTS_AT_ONCE, encode_batches, similarity_matrix
from lib.training.optim import build_optimizer
from tools.benchmark.evaluate import parts_of
from tools.benchmark.lengths import draw_lengths
from tools.benchmark.measure import (
    add_measuring,
    amp_of,
    check_at_least_one,
    chosen_one,
    seconds_of,
    torch_device,
)
from tools.benchmark.report import judge

METHODS = ("laps", "seps", "ilaps", "scan", "chan", "vse")  # seps without a dense text
VOCABULARY = 30522  # bert-base-uncased
PATCH = 16
EPOCH = 145_000  # pairs of Flickr30K's training split, 29,000 images with five captions
EVALUATION = (1000, 5000)  # images and captions of its test split
TEXT, HEAD, SIMILARITY, OPTIMIZER = "text encoder", "image head", "similarity", "optimizer"
BAR = {"of_text": 1}
Value = TypeVar("Value")


@dataclass(frozen=True)
class EpochCase:
    """Training on frozen features of `patches` + 1 tokens of `image_width` channels."""

    method: str
    mode: str
    patches: int
    image_width: int
    text_layers: int
    text_width: int
    batch: int
    embed_size: int = 512
    device: str = "cpu"
    amp: str = "off"
    seed: int = 0

    @property
    def name(self) -> str:
        return (
            f"{self.method}, {self.patches}x{self.image_width} features, "
            f"BERT {self.text_layers}x{self.text_width}"
        )

    def model(self) -> Method:
        """Return the untrained method; its image backbone, which is never run, has one layer."""
        from transformers import BertConfig, ViTConfig  # slow to import

        args = model_defaults()
        vars(args).update(
            method=self.method,
            dataset="coco",
            seed=self.seed,
            embed_size=self.embed_size,
            img_res=PATCH * math.isqrt(self.patches),
            dense_side="none",
            freeze="image",
        )
        image = ViTConfig(
            image_size=args.img_res,
            patch_size=PATCH,
            hidden_size=self.image_width,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=4,
        )
        text = BertConfig(
            hidden_size=self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=max(1, self.text_width // 64),
            intermediate_size=4 * self.text_width,
        )
        torch.manual_seed(self.seed)
        model = build_model(args, VOCABULARY, image.to_dict(), text.to_dict())
        model.set_hard_negatives(self.mode == "hardest")
        return model.train().to(self.device)

    def inputs(self) -> Batch:
        """Return random hidden states and captions, of real ones' lengths, on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.patches + 1, self.image_width)
        lengths = torch.tensor(draw_lengths("caption", self.batch, self.seed))
        words = (self.batch, int(lengths.max()))
        batch = Batch(
            pixels=torch.randn(shape, generator=generator).half(),
            image_ids=torch.arange(self.batch),
            ids=torch.randint(999, VOCABULARY, words, generator=generator),
            lengths=lengths,
        )
        return batch.to(self.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sizes and of the measuring."""
    parser.add_argument("--method", default="laps", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--mode", default="hardest", choices=["hardest", "sum"], help="negatives")
    parser.add_argument("--patches", type=int, default=196, help="of an image, a square number")
    parser.add_argument("--image_width", type=int, default=768, help="channels of a feature")
    parser.add_argument("--text_layers", type=int, default=12, help="BERT-base 12, MiniLM 6")
    parser.add_argument("--text_width", type=int, default=768, help="BERT-base 768, MiniLM 384")
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step")
    parser.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    parser.add_argument("--encoded", type=int, default=128, help="captions that are encoded")
    parser.add_argument(
        "--scored", type=int, default=TEXTS_AT_ONCE, help="captions that 64 images are scored with"
    )
    add_measuring(parser, clock=None)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each part of an epoch, then of an evaluation."""
    flags = "patches image_width text_layers text_width batch embed_size encoded scored repeats"
    check_at_least_one(args, *flags.split())
    if math.isqrt(args.patches) ** 2 != args.patches:
        raise InputError(f"--patches {args.patches}: give a square number, as 196 or 256")
    if args.batch < 2:
        raise InputError(f"--batch {args.batch}: a single pair has no negatives; make it larger")
    method = chosen_one(args.method, "method", METHODS)
    device = torch_device(args.device)
    clock = args.clock or ("cpu" if device.type == "cpu" else "wall")
    sizes = {name: getattr(args, name) for name in EpochCase.__dataclass_fields__}
    case = EpochCase(**{**sizes, "method": method, "amp": amp_of(args)})
    print(f"epoch of {case.name}", file=sys.stderr, flush=True)
    model = case.model()
    epoch = training_seconds(case, model, args.repeats, clock)
    print(f"evaluation of {case.name}", file=sys.stderr, flush=True)
    evaluation = evaluation_seconds(case, model, args, clock)
    steps = math.ceil(EPOCH / case.batch)
    images, captions = EVALUATION
    epoch = {part: steps * one for part, one in epoch.items()}
    both = {part: one + evaluation.get(part, 0.0) for part, one in epoch.items()}
    trained = f"{args.repeats} of {steps:,} steps of {case.batch} pairs measured"
    scored = (
        f"{args.encoded} captions and {parts_of(images)[0].stop} x {args.scored} pairs measured"
    )
    return [
        *rows_of(f"epoch of {EPOCH:,} pairs, {case.mode}", epoch, f"{case.name}: {trained}"),
        *rows_of(f"evaluation {images:,} x {captions:,}", evaluation, f"{case.name}: {scored}"),
        *rows_of("both", both, f"{case.name}: {trained}, and {scored}"),
    ]


def rows_of(what: str, seconds: dict[str, float], measured: str) -> list[dict[str, Any]]:
    """Return a row a part; the similarity's is judged beside the text encoder's."""
    rows = []
    whole = sum(seconds.values())
    for part, one in seconds.items():
        row = {"name": f"{what}: {part}", "unit": "s", "ours": one, "part": one / whole}
        if part == SIMILARITY:
            row["of_text"] = one / seconds[TEXT]
            row["note"] = (
                f"{100 * row['part']:.0f} % of the whole, {row['of_text']:.2f} of the text "
                f"encoder; {measured}, the rest by proportion"
            )
        rows.append(judge(row, BAR if part == SIMILARITY else {}))
    return rows


# --- training ------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds of each part."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device = device
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def __call__(self, part: str, work: Callable[[], Value]) -> Value:
        """Return what `work` does, its seconds added to the part's."""
        found: list[Value] = []
        took = seconds_of(lambda: found.append(work()), self.device, self.clock)
        self.seconds[part] = self.seconds.get(part, 0.0) + took
        return found[0]


def training_seconds(case: EpochCase, model: Method, steps: int, clock: str) -> dict[str, float]:
    """Return each part's median seconds a step, after a step that warms up."""
    optimizer = build_optimizer(model, 1e-5)
    found = []
    for number in range(steps + 1):
        watch = Stopwatch(torch_device(case.device), clock)
        batch = replace(case, seed=case.seed + number).inputs()
        backward(model, batch, autocast_for(case.amp, torch.device(case.device)), watch)
        watch(OPTIMIZER, lambda: _update(model, optimizer))
        found.append(watch.seconds)
    return {part: statistics.median(one[part] for one in found[1:]) for part in found[0]}


def backward(model: Method, batch: Batch, autocast: Callable, watch: Stopwatch) -> None:
    """Give every parameter the gradient of the training loss, by parts that are clocked."""
    with autocast():
        texts = watch(TEXT, lambda: model.encode_text_batch(batch))
        images = watch(HEAD, lambda: model.encode_image_batch(batch))
        leaves = _leaves(images), _leaves(texts)
        loss = watch(SIMILARITY, lambda: model.losses(*leaves, batch.image_ids)["loss"])
    watch(SIMILARITY, loss.backward)
    watch(TEXT, lambda: _hand_on(texts, leaves[1]))
    watch(HEAD, lambda: _hand_on(images, leaves[0]))


def _leaves(tokens: Tokens) -> Tokens:
    """Return the same tokens, cut off from what made them."""
    cls = None if tokens.cls is None else tokens.cls.detach().requires_grad_()
    return replace(tokens, local=tokens.local.detach().requires_grad_(), cls=cls)


def _hand_on(tokens: Tokens, leaves: Tokens) -> None:
    """Go on with the backward pass from the tokens' gradients."""
    ends = [(tokens.local, leaves.local), (tokens.cls, leaves.cls)]
    reached: list[tuple[Tensor, Tensor]] = [
        (one, leaf.grad) for one, leaf in ends if leaf is not None and leaf.grad is not None
    ]
    if reached:
        torch.autograd.backward(*map(list, zip(*reached, strict=True)))


def _update(model: Method, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- evaluation ----------------------------------------------------------------------------------


def evaluation_seconds(
    case: EpochCase, model: Method, args: argparse.Namespace, clock: str
) -> dict[str, float]:
    """Return the seconds of each part of the whole evaluation, from a sample of each."""
    device, (images, captions) = torch_device(case.device), EVALUATION
    block = parts_of(images)[0].stop
    model.eval()
    texts = _batches(replace(case, batch=args.encoded).inputs(), ("ids", "lengths"))
    pictures = _batches(replace(case, batch=block).inputs(), ("pixels",))
    autocast = autocast_for(case.amp, device)
    calls = {
        TEXT: lambda: encode_batches(model.encode_text_batch, texts, device, autocast),
        HEAD: lambda: encode_batches(model.encode_image_batch, pictures, device, autocast),
        SIMILARITY: scoring(model, texts, pictures, args.scored, device, autocast),
    }
    shares = {
        TEXT: captions / args.encoded,
        HEAD: images / block,
        SIMILARITY: images * captions / (block * args.scored),
    }
    seconds = {}
    for part, call in calls.items():
        call()
        found = [seconds_of(call, device, clock) for _ in range(args.repeats)]
        seconds[part] = shares[part] * statistics.median(found)
    return seconds


def scoring(
    model: Method,
    texts: Sequence[Batch],
    pictures: Sequence[Batch],
    captions: int,
    device: torch.device,
    autocast: Callable,
) -> Callable[[], Any]:
    """Return the scoring of the pictures with so many captions, of the encoded ones in turn."""
    images = encode_batches(model.encode_image_batch, pictures, device, autocast)
    words = encode_batches(model.encode_text_batch, texts, device, autocast)
    times = math.ceil(captions / sum(map(len, words)))
    group = Tokens.cat(words * times)[:captions]
    count = sum(map(len, images))
    return lambda: similarity_matrix(model, images, [group], autocast, count)


def _batches(batch: Batch, names: Sequence[str]) -> list[Batch]:
    """Return the fields in batches as eval.py's loaders make them, words cut to the longest."""
    batches = []
    for part in parts_of(len(batch.ids)):
        one = Batch(**{name: getattr(batch, name)[part] for name in names})
        if one.ids is not None:
            one.ids = one.ids[:, : int(one.lengths.max())]
        batches.append(one)
    return batches
