"""A whole training step, encoders and optimizer included, against the loop's similarity.

ViT-B/16 and BERT-base with random weights: a step takes as long with any. The bars are for CUDA, at
batch 64 in bf16, and at 512, which the loop need not fit; a CPU runs a small batch.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lib.batch import Batch
from lib.methods.base import Method
from lib.methods.registry import build_model, model_defaults
from lib.model.precision import autocast_for
from lib.training.optim import build_optimizer
from tools.benchmark.cases import Case, least_work, loop_memory
from tools.benchmark.lengths import draw_lengths
from tools.benchmark.loop import LOOPS, PEERS
from tools.benchmark.measure import (
    add_measuring,
    amp_of,
    check_at_least_one,
    chosen_list,
    cuda_peak,
    free_memory,
    positive_list,
    roofline,
    rss_peak,
    side_by_side,
    torch_device,
)
from tools.benchmark.report import judge

VOCABULARY = 30522  # bert-base-uncased
BARS = {64: {"ratio": 2, "gigabytes": 8}, 512: {"gigabytes": 140}}  # on CUDA, in bf16
USABLE = 0.5  # share of the free memory that the loop's similarity may fill: encoders need theirs
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class StepCase:
    """A training step of `batch` pairs with random pixels and words."""

    method: str
    mode: str  # hardest or sum
    batch: int
    encoders: str = "base"  # or tiny
    embed_size: int = 512
    device: str = "cpu"
    amp: str = "off"
    seed: int = 0

    @property
    def side(self) -> int:
        return 224 if self.encoders == "base" else 32

    def model(self, way: str = "ours") -> Method:
        """Return the untrained method, or where `way` is "loop" its peer, with encoders."""
        args = model_defaults()
        vars(args).update(
            method=self.method if way == "ours" else PEERS[self.method],
            dataset="coco",
            seed=self.seed,
            embed_size=self.embed_size,
            img_res=self.side,
            detach_patches=0,
        )
        configs: dict[str, Any] = {}
        if self.encoders == "base":
            from transformers import BertConfig, ViTConfig  # slow to import

            configs = {"image_config": ViTConfig().to_dict(), "text_config": BertConfig().to_dict()}
        else:
            vars(args).update(vit_type="tiny", bert_path="tiny")
        torch.manual_seed(self.seed)
        model = build_model(args, VOCABULARY, **configs)
        model.set_hard_negatives(self.mode == "hardest")
        return model.train().to(self.device)

    def inputs(self) -> Batch:
        """Return random pairs with dense texts, lengths as of real ones."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, 3, self.side, self.side)
        batch = Batch(
            pixels=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            image_ids=torch.arange(self.batch),
        )
        batch.ids, batch.lengths = self._words("caption", generator)
        batch.dense_ids, batch.dense_lengths = self._words("dense", generator)
        return batch.to(self.device)

    def _words(self, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor(draw_lengths(kind, self.batch, self.seed))
        shape = (self.batch, int(lengths.max()))
        return torch.randint(999, VOCABULARY, shape, generator=generator), lengths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step and of the measuring."""
    parser.add_argument("--method", default="laps,seps", help="one or several of them")
    parser.add_argument(
        "--batch", default=None, help="as in 64,512; default: 4 on the CPU, 64,512 on CUDA"
    )
    parser.add_argument("--mode", default="hardest", choices=["hardest", "sum"], help="negatives")
    parser.add_argument("--encoders", default="base", choices=["base", "tiny"], help="size")
    parser.add_argument("--embed_size", type=int, default=512, help="width C of the joint space")
    add_measuring(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each method and batch."""
    check_at_least_one(args, "repeats", "embed_size")
    cpu = torch_device(args.device).type == "cpu"
    methods = chosen_list(args.method, "method", tuple(PEERS))
    batches = positive_list(args.batch or ("4" if cpu else "64,512"), "batch")
    settings = {
        "encoders": args.encoders,
        "embed_size": args.embed_size,
        "device": args.device,
        "amp": amp_of(args),
        "seed": args.seed,
    }
    rows = []
    for method in methods:
        for batch in batches:
            case = StepCase(method, args.mode, batch, **settings)
            print(f"step of {method}, batch {batch}", file=sys.stderr, flush=True)
            rows.append(measure_step(case, args))
    return rows


def measure_step(
    case: StepCase, args: argparse.Namespace, bar: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return the row of one case: steps a second and peak memory of both ways.

    It is judged by `bar`, where none is given by that of the batch.
    """
    device = torch_device(case.device)
    model = case.model()
    pairs = similarity_case(case, model)
    ways = ["loop", "ours"] if loop_memory(pairs) < USABLE * free_memory(device) else ["ours"]
    notes = ["random weights"] + ([] if len(ways) == 2 else ["the loop would not fit the memory"])
    row = {"name": f"{case.method} step {case.mode} batch {case.batch}", "unit": "steps/s"}
    try:
        # where both are one method, one model: two with their optimizers are 4 GB
        peer = model if PEERS[case.method] == case.method else case.model("loop")
        calls = {way: step_of(case, way, model if way == "ours" else peer) for way in ways}
        seconds = side_by_side(calls, args.repeats, device)
        row.update({way: 1 / seconds[way] for way in ways}, amp=case.amp)
        work = step_work(case, model, pairs)
        if args.roofline:
            row.update(roofline(work, seconds["ours"], device, case.amp))
        calls.clear()
        del model, peer
        if args.memory:
            row.update({f"{way}_memory": whole_peak(case, way, device) for way in ways})
    except torch.cuda.OutOfMemoryError:
        return dict(row, note=", ".join([*notes, "out of memory"]), met=False)
    if bar is None:
        wanted = device.type == "cuda" and case.amp == "bf16" and case.encoders == "base"
        bar = BARS.get(case.batch, {}) if wanted else {}
    if device.type == "cpu":
        notes.append("the bar is for CUDA")
    return dict(judge(row, bar), note=", ".join(notes))


def step_of(case: StepCase, way: str, model: Method) -> Callable[[], None]:
    """Return one training step, with ours or with the loop's similarity."""
    optimizer = build_optimizer(model, LEARNING_RATE)
    batch = case.inputs()
    autocast = autocast_for(case.amp, torch.device(case.device))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            losses = our_loss(model, batch) if way == "ours" else loop_loss(model, batch)
        losses.backward()
        optimizer.step()

    return step


def our_loss(model: Method, batch: Batch) -> Tensor:
    """Return the loss as train.py computes it."""
    dense = batch.dense_ids, batch.dense_lengths
    words = batch.ids, batch.lengths
    return model.training_losses(batch.pixels, *words, batch.image_ids, *dense)["loss"]


def loop_loss(model: Method, batch: Batch) -> Tensor:
    """Return the same loss, its matrix made by the loop (the ratio loss is constant)."""
    images, texts = model.encode_image_batch(batch), model.encode_text_batch(batch)
    return model.criterion(LOOPS[model.name](model, images, texts), batch.image_ids)


def prepare_step(case: StepCase, way: str) -> tuple[Callable, Callable]:
    """Return a step of two pairs and the case's own, with one model."""
    model = case.model(way)
    return step_of(replace(case, batch=2), way, model), step_of(case, way, model)


def whole_peak(case: StepCase, way: str, device: torch.device) -> int | None:
    """Return the peak memory of a step in bytes: weights, optimizer and all."""
    if device.type == "cuda":
        gc.collect()  # what was timed before must not count
        return cuda_peak(prepare_step(case, way)[1], device, added=False)
    return rss_peak(prepare_step, case, way, added=False)


# --- the least work ------------------------------------------------------------------------------


def similarity_case(case: StepCase, model: Method) -> Case:
    """Return the similarity's part of the step."""
    return Case(
        method=case.method,
        mode=case.mode,
        patches=model.image_encoder.num_patches,
        words=None,
        images=case.batch,
        captions=case.batch,
        embed_size=case.embed_size,
        device=case.device,
        amp=case.amp,
        seed=case.seed,
    )


def step_work(case: StepCase, model: Method, pairs: Case) -> tuple[float, float]:
    """Return the least operations and bytes moved of a step.

    A token costs two operations for each weight of its encoder's linear layers, and as many twice
    in the backward pass; the similarity's are `cases.least_work`. AdamW reads and writes weight,
    gradient and two moments.
    """
    vision, text = linear_weights(model.image_encoder), linear_weights(model.text_encoder)
    operations = 6.0 * vision * case.batch * (pairs.patches + 1) + 6.0 * text * sum(pairs.lengths)
    if model.dense_owner is not None:
        operations += 2.0 * text * sum(draw_lengths("dense", case.batch, case.seed))
    similarity, _ = least_work(pairs)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return operations + similarity, 8.0 * 4 * weights


def linear_weights(module: nn.Module) -> int:
    """Return the number of weights in a module's linear layers."""
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))
