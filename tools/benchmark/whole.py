"""Everything that a GPU is asked for, in one call: bars first, then the grid, within a budget.

Similarity in evaluation and training, a whole training step, COCO 5K and growth, by the other
commands' own measurements at fixed sizes. The rival is the official networks' way in the same run,
as many images at a time as its code takes. What fails is a row that says why, what does not fit
into the budget is named, and the table is printed in Markdown for docs/performance.md. A CPU takes
the same way at small sizes, where nothing is judged.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib.model import kernels
from tools.benchmark import epoch, evaluate, report, scale
from tools.benchmark.budget import Planned, Row, ran_out, within
from tools.benchmark.cases import ENCODERS, MODES, Case
from tools.benchmark.loop import PEERS
from tools.benchmark.measure import check_at_least_one, torch_device
from tools.benchmark.similarity import measure_case
from tools.benchmark.step import StepCase, measure_step

BUDGET = 450.0  # seconds: with the imports one call stays below 8 minutes
PRECISIONS = {"off": "float32", "bf16": "bf16", "fp16": "fp16"}
EVALUATION_BAR = {"ratio": 30}
COCO_BAR = {"seconds": 10}
STEP_BAR = {"ratio": 2, "gigabytes": 8}


@dataclass(frozen=True)
class Sizes:
    """What is measured; `images` of an evaluation are scored `loop_captions` at a time.

    Both are 256 in the official code (its --shard_size).
    """

    images: int = 256
    captions: int = 1024
    loop_captions: int = 256
    batch: int = 64
    large_batch: int = 512
    patches: tuple[int, ...] = (196, 576, 49, 144)
    embed_size: int = 512
    coco: tuple[int, int] = evaluate.COCO
    encoders: str = "base"
    growth: str = "1000,2000,4000"
    text: tuple[int, int] = (12, 768)  # layers and width of the epoch's text encoder
    guesses: Mapping[str, float] | None = None

    def guess(self, kind: str) -> float:
        """Return how many seconds the first measurement of a kind may take."""
        return (self.guesses or {}).get(kind.split()[0], 0.0)


GUESSES = {
    "similarity": 15.0,
    "COCO": 60.0,
    "step": 30.0,
    "passes": 10.0,
    "epoch": 40.0,
    "growth": 30.0,
}
SIZES = {
    "full": Sizes(guesses=GUESSES),
    "small": Sizes(
        images=4,
        captions=6,
        loop_captions=4,
        batch=4,
        large_batch=6,
        patches=(9, 49),
        embed_size=16,
        coco=(6, 12),
        encoders="tiny",
        growth="8,16",
        text=(1, 64),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the budget and of the measuring."""
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds that measuring may take"
    )
    parser.add_argument(
        "--sizes",
        default=None,
        choices=sorted(SIZES),
        help="default: full on CUDA, small on the CPU, where it shows that all of it runs",
    )
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and lengths")


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each measurement, as it is done."""
    check_at_least_one(args, "repeats")
    started = time.monotonic()
    device = torch_device(args.device)
    sizes = SIZES[args.sizes or ("full" if device.type == "cuda" else "small")]
    planned = plan(args, sizes, judged=device.type == "cuda" and sizes is SIZES["full"])
    yield from within(planned, args.budget - (time.monotonic() - started))


def page(found: Mapping[str, Any]) -> str:
    """Return the table as docs/performance.md has it, the notes of its rows, and the verdicts."""
    rows = found["rows"]
    judged = report.verdicts(rows) or ["none: bars are judged on CUDA at full sizes"]
    facts = [f"{name} {found[name]}" for name in ("driver", "cuda") if found.get(name)]
    facts += [f"{name} {version}" for name, version in found["versions"].items()]
    lines = [f"{found['machine']}; {', '.join(facts)}; {found['date']}", f"`{found['command']}`"]
    lines += [*plain_form(rows), "", *report.markdown(rows), ""]
    lines += [f"- {row['name']}: {row['note']}" for row in rows if row.get("note")]
    return "\n".join([*lines, "", "Bars:", *(f"- {line}" for line in judged)])


def plain_form(rows: Sequence[Row]) -> list[str]:
    """Return a line that says so where PyTorch scored in the fused program's place."""
    if all(row.get("fused_scoring", True) for row in rows):
        return []
    return ["The fused program could not be built here: PyTorch's form was measured."]


# --- the plan ------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, sizes: Sizes, judged: bool) -> list[Planned]:
    """Return what is measured, what matters most first; bars only where they are `judged`."""
    first = sizes.patches[0]
    bars = {
        ("laps", "eval", first, "off"): EVALUATION_BAR,
        ("laps", "hardest", first, "bf16"): STEP_BAR,
        ("laps", "sum", first, "bf16"): STEP_BAR,
    }
    asked = [*bars, *(one for one in grid(sizes.patches) if one not in bars)]
    similarities = [
        similarity_planned(args, sizes, *one, bars.get(one, {}) if judged else {}) for one in asked
    ]
    step_bar = STEP_BAR if judged else {}
    return [
        similarities[0],
        coco_planned(args, sizes, "laps", COCO_BAR if judged else {}),
        *similarities[1:3],
        step_planned(args, sizes, "laps", "bf16", sizes.batch, step_bar),
        *similarities[3:],
        step_planned(args, sizes, "seps", "bf16", sizes.batch),
        step_planned(args, sizes, "seps_released", "bf16", sizes.batch),
        step_planned(args, sizes, "laps", "fp16", sizes.batch),
        step_planned(args, sizes, "laps", "off", sizes.batch),
        step_planned(args, sizes, "laps", "bf16", sizes.large_batch),
        coco_planned(args, sizes, "seps"),
        passes_planned(args, sizes),
        epoch_planned(args, sizes, judged),
        growth_planned(args, sizes),
    ]


def grid(patches: tuple[int, ...]) -> list[tuple[str, str, int, str]]:
    """Return (method, mode, patches, precision) of all similarities, evaluation in float32 first.

    Training follows in bf16, then the rest.
    """
    usual = {("off", "eval"): 0, ("bf16", "hardest"): 1, ("bf16", "sum"): 1}
    every = [
        (method, mode, count, amp)
        for amp in PRECISIONS
        for count in patches
        for mode in MODES
        for method in PEERS
    ]
    return sorted(every, key=lambda one: usual.get((one[3], one[1]), 2))


def settings(args: argparse.Namespace, sizes: Sizes, **changes: Any) -> argparse.Namespace:
    """Return the arguments as the other commands have them."""
    cuda = torch_device(args.device).type == "cuda"
    both = {"clock": "wall", "memory": int(cuda), "roofline": int(cuda)}
    sized = {"embed_size": sizes.embed_size, "loop_captions": sizes.loop_captions}
    return argparse.Namespace(**{**vars(args), **both, **sized, **changes})


def similarity_planned(
    args: argparse.Namespace,
    sizes: Sizes,
    method: str,
    mode: str,
    patches: int,
    amp: str,
    bar: Mapping[str, float],
) -> Planned:
    """Return the similarity of one method, alone or with its backward pass."""
    training = mode != "eval"
    case = Case(
        method,
        mode,
        patches,
        None,
        images=sizes.batch if training else sizes.images,
        captions=sizes.batch if training else sizes.captions,
        embed_size=sizes.embed_size,
        device=args.device,
        amp=amp,
        seed=args.seed,
    )
    name = f"{case.name} {PRECISIONS[amp]}"
    cuda = torch_device(args.device).type == "cuda"
    loop = sizes.loop_captions if bar else max(1, sizes.loop_captions // 2)  # each costs the same
    asked = settings(args, sizes, loop_captions=loop, memory=int(cuda and training))

    def measure() -> list[Row]:
        try:
            row = measure_case(case, asked, bar)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            row = measure_case(case, asked, bar, with_loop=False)  # it may be the official way's
        if mode == "sum":  # every pair has gradient: no program on a GPU has a backward pass
            return [dict(row, name=name)]
        fused = kernels.is_available(torch.device(args.device))
        return [dict(row, name=name, fused_scoring=fused)]

    kind = f"similarity {mode} {patches}"
    return Planned(name, kind, measure, sizes.guess(kind), bar)


def coco_planned(
    args: argparse.Namespace, sizes: Sizes, method: str, bar: Mapping[str, float] | None = None
) -> Planned:
    """Return the scoring of COCO 5K from made features, once, after a block of images."""
    bar = bar or {}
    images, captions = sizes.coco
    patches = sizes.patches[0]
    asked = settings(
        args,
        sizes,
        images=images,
        captions=captions,
        patches=patches,
        amp="off",
        repeats=1,
        loop_images=sizes.images,
    )
    encoder = ENCODERS.get(patches, f"{patches} patches")
    name = f"{method} scoring, {encoder} real {images}x{captions} float32"

    def measure() -> list[Row]:
        return [dict(evaluate.scoring_row(method, asked, bar), name=name)]

    return Planned(name, "COCO", measure, sizes.guess("COCO"), bar)


def step_planned(
    args: argparse.Namespace,
    sizes: Sizes,
    method: str,
    amp: str,
    batch: int,
    bar: Mapping[str, float] | None = None,
) -> Planned:
    """Return a whole training step, encoders and optimizer included."""
    case = StepCase(
        method,
        "hardest",
        batch,
        encoders=sizes.encoders,
        embed_size=sizes.embed_size,
        device=args.device,
        amp=amp,
        seed=args.seed,
    )
    name = f"{method} whole step hardest batch {batch} {PRECISIONS[amp]}"
    asked, bar = settings(args, sizes), bar or {}

    def measure() -> list[Row]:
        row = measure_step(case, asked, bar)
        if row["note"].endswith("out of memory"):
            return [{"name": name, "failed": row["note"], "bar": dict(bar), "met": None}]
        return [dict(row, name=name)]

    kind = f"step {batch}"
    return Planned(name, kind, measure, sizes.guess(kind), bar)


def passes_planned(args: argparse.Namespace, sizes: Sizes) -> Planned:
    """Return how many images each way puts through the encoder."""
    asked = settings(args, sizes, encoded=8)
    return Planned(
        "images encoded",
        "passes",
        lambda: [evaluate.passes_row("laps", asked)],
        sizes.guess("passes"),
    )


def epoch_planned(args: argparse.Namespace, sizes: Sizes, judged: bool) -> Planned:
    """Return where an epoch's and an evaluation's time goes, features frozen."""
    hidden = () if judged else ("bar", "met")
    given = {"method": "laps", "mode": "hardest", "batch": sizes.batch, "clock": None}
    made = {"patches": sizes.patches[0], "image_width": 768, "encoded": 8 * sizes.batch}
    text = dict(zip(("text_layers", "text_width"), sizes.text, strict=True))
    asked = settings(args, sizes, **given, **made, **text, scored=sizes.captions, amp="off")

    def measure() -> list[Row]:
        rows = epoch.run(asked)
        return [{key: row[key] for key in row if key not in hidden} for row in rows]

    return Planned("epoch", "epoch", measure, sizes.guess("epoch"))


def growth_planned(args: argparse.Namespace, sizes: Sizes) -> Planned:
    """Return how time and memory grow with images and with the batch."""
    batches = f"{sizes.batch // 2},{sizes.batch}"
    given = {"images": sizes.growth, "batches": batches, "patches": 16, "embed_size": 32}
    asked = settings(args, sizes, method="laps", mode="hardest", **given)
    return Planned("growth", "growth", lambda: scale.run(asked), sizes.guess("growth"))
