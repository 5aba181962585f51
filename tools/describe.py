"""Have a multimodal model describe images: python -m tools.describe --dataset NAME.

Writes the dense texts NAME_{split}.jsonl, a line an image as soon as it is there. The same command
goes on after a stop or a kill, and tries failures again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lib.data.describe.openai_backend import OpenAIBackend, ServerSettings
from lib.data.describe.outcomes import DEFAULT_MODEL, PROMPT, Backend, Sampling, Task
from lib.data.describe.run import Tally, describe_images, parse_part
from lib.data.layout import SPLITS, dataset_folder, dense_file, file_stem, image_folder
from lib.data.prepare.folder import list_images
from lib.data.prepare.photos import Photo, give_ids
from lib.data.splits import load_split
from lib.errors import InputError
from lib.flags import Parser
from lib.program import program, run_program


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Describe as the flags say; return the exit code.

    0: every image has its text, 1: some failed, 2: bad input, 130: stopped.
    """
    try:
        args = parser().parse_args(argv)
        check(args)
        jobs = folder_job(args) if args.images else split_jobs(args)
        return run(args, jobs)
    except OSError as error:
        print(f"error: {error}; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    top = Parser("tools.describe", description=__doc__)
    what = top.add_argument_group("what is described")
    what.add_argument("--dataset", default=None, metavar="NAME", help="as train.py")
    what.add_argument("--split", default=None, help="e.g. train,dev,test; default: all there are")
    what.add_argument("--data_path", default="data/", help="as train.py")
    what.add_argument("--image_path", default=None, metavar="DIR", help="image folder, as train.py")
    what.add_argument("--images", type=Path, default=None, metavar="DIR", help="any folder instead")
    what.add_argument("--out", type=Path, default=None, help="with --images: the .jsonl to write")
    what.add_argument("--part", default=None, metavar="i/n", help="one machine's share of n")
    what.add_argument("--limit", type=int, default=None, help="only the first images, to try it")
    how = top.add_argument_group("how; the defaults are the SEPS paper's")
    how.add_argument("--prompt", default=PROMPT, help="asked of each image")
    how.add_argument("--temperature", type=float, default=0.2, help="0: the likeliest words")
    how.add_argument("--top_p", type=float, default=0.9, help="mass of the words drawn from")
    how.add_argument("--max_new_tokens", type=int, default=500, help="longest answer")
    how.add_argument("--image_size", type=int, default=672, help="longest side sent, in pixels")
    how.add_argument("--backend", choices=["openai", "transformers"], default=None,
                     help="default: openai with --base_url, else transformers")  # fmt: skip
    how.add_argument("--model", default=None, help="name, hub id or folder; default: the server's "
                     f"only one, or {DEFAULT_MODEL}")  # fmt: skip
    server = top.add_argument_group("backend openai: vLLM or any server of that protocol")
    server.add_argument("--base_url", default=None, help="e.g. http://localhost:8000/v1")
    server.add_argument("--concurrency", type=int, default=16, help="images asked for at once")
    server.add_argument("--time_limit", type=float, default=120, help="seconds for one answer")
    server.add_argument("--retries", type=int, default=5, help="with back-off, for one image")
    local = top.add_argument_group("backend transformers: a model in this process")
    local.add_argument("--batch_size", type=int, default=8, help="images at once")
    local.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the weights"
    )
    local.add_argument("--device_map", default=None, help="e.g. auto: spread over GPUs")
    local.add_argument("--seed", type=int, default=0, help="of the words drawn")
    return top


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that can't work."""
    if (args.images is None) == (args.dataset is None):
        raise InputError("give either --dataset NAME or --images DIR")
    if args.images is not None and (args.out is None or args.out.suffix != ".jsonl"):
        raise InputError("--images needs --out FILE.jsonl")


def split_jobs(args: argparse.Namespace) -> list[tuple[str, list[Task], Path]]:
    """Return (what, images, file of texts) for each split."""
    folder = dataset_folder(args.data_path, args.dataset)
    there = [s for s in SPLITS if (folder / f"{file_stem(args.dataset, s)}_caps.txt").exists()]
    wanted = there if args.split is None else args.split.split(",")
    unknown = [one for one in wanted if one not in SPLITS]
    if unknown or not wanted:
        raise InputError(f"--split {args.split or ''}: choose from {', '.join(SPLITS)}")
    jobs = []
    for name in wanted:
        root = args.image_path or image_folder(args.data_path, args.dataset)
        split = load_split(args.data_path, args.dataset, name, root)
        tasks = [
            Task(image_id, os.path.relpath(path, root).replace(os.sep, "/"), Path(path))
            for image_id, path in zip(split.image_ids, split.image_files, strict=True)
        ]
        jobs.append((name, tasks, dense_file(args.data_path, args.dataset, name)))
    return jobs


def folder_job(args: argparse.Namespace) -> list[tuple[str, list[Task], Path]]:
    """Return the same for a folder of pictures without a data set."""
    photos = [Photo(name) for name in list_images(args.images)]
    if not photos:
        raise InputError(f"--images {args.images}: no images there")
    give_ids(photos)
    tasks = [Task(str(one.image_id), one.name, args.images / one.name) for one in photos]
    return [(str(args.images), tasks, args.out)]


def run(args: argparse.Namespace, jobs: list[tuple[str, list[Task], Path]]) -> int:
    """Describe each job's images; return the exit code."""
    sampling = Sampling(
        args.prompt, args.temperature, args.top_p, args.max_new_tokens, args.image_size
    )
    part = parse_part(args.part) if args.part else None
    backends: list[Backend] = []

    def backend() -> Backend:
        if not backends:
            backends.append(make_backend(args, sampling))
        return backends[0]

    code = 0
    for what, tasks, path in jobs:
        with Bar(what) as bar:
            tally = describe_images(tasks, path, backend, sampling, part, args.limit, bar.show)
        report(what, tally)
        code = max(code, int(bool(tally.failed or tally.stopped)))
        if tally.stopped:
            break
    return code


def make_backend(args: argparse.Namespace, sampling: Sampling) -> Backend:
    """Return the backend that the flags name."""
    kind = args.backend or ("openai" if args.base_url else "transformers")
    if kind == "openai":
        server = ServerSettings(args.base_url, args.concurrency, args.time_limit, args.retries)
        return OpenAIBackend(args.model, sampling, server)
    from lib.data.describe.transformers_backend import TransformersBackend  # loads torch

    return TransformersBackend(
        args.model, sampling, args.batch_size, args.dtype, args.device_map, args.seed
    )


class Bar:
    """Progress of one job, with the time left."""

    def __init__(self, what: str) -> None:
        self.bar = tqdm(desc=what, unit="img", leave=False, ncols=80)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, tally: Tally) -> None:
        """Show how far it is; what was there before the call does not count for the time left."""
        if self.bar.total is None:
            self.bar.total = tally.images
            self.bar.initial = self.bar.n = tally.known
        if tally.failed:
            self.bar.set_postfix_str(f"{len(tally.failed)} failed", refresh=False)
        self.bar.update(tally.known + tally.written + len(tally.failed) - self.bar.n)


def report(what: str, tally: Tally) -> None:
    """Print what one job came to."""
    print(f"{what}: {tally.written} texts written, {tally.known} were there: {tally.file}")
    if tally.cut:
        print(f"  {tally.cut} of them used up --max_new_tokens and end in the middle")
    if tally.parts_missing:
        print("  other parts are not done yet; the last to finish puts them together")
    for name, reason in list(tally.failed.items())[:3]:
        print(f"  failed: {name}: {reason}")
    if tally.failed:
        left = f"{len(tally.failed)} failed" + (", …" if len(tally.failed) > 3 else "")
        print(f"  {left}; listed in {_failed_file(tally)}; the same command tries them again")
    if tally.stopped:
        print(f"  stopped: {tally.stopped}; the same command goes on")


def _failed_file(tally: Tally) -> str:
    return str(tally.file.with_name(f"{tally.file.stem}.failed.jsonl")) if tally.file else ""


if __name__ == "__main__":
    run_program(main)
