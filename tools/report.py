"""A report of runs in one HTML file: python -m tools.report runs/x [runs/y …]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from data import read_split, validation_loaders
from lib.data.images import decode
from lib.data.splits import Split
from lib.errors import InputError
from lib.files import check_destination, read_json, write_text_whole
from lib.flags import Parser
from lib.model.precision import autocast_for
from lib.program import program, run_program
from lib.retrieval.evaluation import split_similarity
from lib.retrieval.evidence import gather_evidence
from lib.retrieval.metrics import QueryRanks, query_ranks
from lib.retrieval.report import Answer, Example, RunReport, page, read_run
from lib.retrieval.result_files import RESULTS, StoredResult, stored_results
from lib.retrieval.sheets import kept_panel, pair_sheet, require_matplotlib
from lib.retrieval.significance import Compared, compare_results
from tools.opened import Opened, data_settings, open_checkpoint

CHECKPOINT = "model_best.pth"
ANSWERS = 5


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return the exit code."""
    args = parser().parse_args(argv)
    require_matplotlib()
    names = run_names(args.runs)
    out = Path(args.out or Path(args.runs[0]) / "report.html")
    check_destination(out, "--out", make_folder=True)
    runs = [read_run(folder, results_of(folder), name) for name, folder in names.items()]
    for run in runs:
        add_pictures(run, args)
    write_text_whole(out, page(runs, differences(runs), args.title or ", ".join(names)))
    print(f"written to {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def parser() -> Parser:
    """Return the parser of the command line."""
    whole = Parser("tools.report", description=__doc__)
    whole.add_argument("runs", nargs="+", metavar="RUN", help="run folders that were evaluated")
    whole.add_argument("--out", default=None, metavar="FILE", help="default: RUN/report.html")
    whole.add_argument("--title", default=None, help="of the page")
    whole.add_argument("--examples", type=int, default=4, help="best and worst queries; 0: none")
    whole.add_argument("--data_path", default=None, help="root of the data sets, where it moved")
    whole.add_argument("--image_path", default=None, metavar="DIR", help="image folder")
    whole.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return whole


def run_names(folders: Sequence[str]) -> dict[str, Path]:
    """Return the folders by the shortest names that tell them apart."""
    paths = [Path(one) for one in folders]
    for path in paths:
        if not path.is_dir():
            raise InputError(f"no run folder {path}")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return dict(zip(names, paths, strict=True))


def results_of(folder: Path) -> dict[str, StoredResult]:
    """Return a run's results; without ranks where an older version evaluated it."""
    entries = read_json(folder / RESULTS)
    if not entries:
        raise InputError(f"{folder} has no {RESULTS}: python eval.py --checkpoint … writes it")
    if any("ranks" in one for one in entries.values()):
        return stored_results(folder)[0]
    return {name: StoredResult(folder, name, facts, None) for name, facts in entries.items()}


def differences(runs: Sequence[RunReport]) -> dict[str, list[Compared]]:
    """Return how each later run differs from the first, where the two can be compared."""
    found = {}
    first, *others = runs
    for other in others:
        sides = [
            {name: one for name, one in run.results.items() if one.ranks is not None}
            for run in (other, first)
        ]
        try:
            found[f"{other.name} − {first.name}"] = compare_results(sides[:1], sides[1:])
        except InputError as error:
            print(f"no significance of {other.name} against {first.name}: {error}")
    return found


def add_pictures(run: RunReport, args: argparse.Namespace) -> None:
    """Add captions and examples to a run, where its checkpoint and data set are at hand."""
    checkpoint = run.folder / CHECKPOINT
    entry = whole_split(run)
    if entry is None or not checkpoint.exists():
        return
    try:
        opened = open_checkpoint(checkpoint, entry.facts.get("method"), device=args.device)
        settings, split = read_data(opened, entry.facts.get("split", "test"), args)
    except InputError as error:
        print(f"{run.name}: no pictures and no captions ({error})")
        return
    counts = entry.facts.get("images"), entry.facts.get("captions")
    if counts != (len(split.image_ids), len(split.captions)):
        print(f"{run.name}: no pictures, the data set is not the one that {entry.name} is of")
        return
    run.captions[entry.name] = split.captions
    if args.examples or entry.ranks is None:
        matrix = similarity(opened, settings, split)
        ranks = query_ranks(matrix, caption_images=split.caption_image)
        if entry.ranks is None:
            run.results[entry.name] = replace(entry, ranks=ranks)
        run.examples = find_examples(opened, matrix, ranks, split, args.examples)


def whole_split(run: RunReport) -> StoredResult | None:
    """Return the entry of a whole split, which is no mean over folds."""
    entries = run.results.values()
    return next((one for one in entries if one.ranks is None or one.ranks.folds == 1), None)


def read_data(
    opened: Opened, name: str, args: argparse.Namespace
) -> tuple[argparse.Namespace, Split]:
    """Return how and what the run was evaluated on."""
    settings = data_settings(opened, args)
    return settings, read_split(settings, name, opened.model.dense_owner is not None)


def similarity(opened: Opened, settings: argparse.Namespace, split: Split) -> np.ndarray:
    """Return the split's similarity matrix, as eval.py computes it."""
    model = opened.model
    loaders = validation_loaders(settings, split, opened.tokenizer, model.dense_owner, pin=False)
    return split_similarity(model, loaders, opened.device, autocast_for("off", opened.device))


def find_examples(
    opened: Opened, matrix: np.ndarray, ranks: QueryRanks, split: Split, count: int
) -> list[Example]:
    """Return the captions that find their image best and worst, with what they found instead.

    Best: rank 1, and the furthest ahead of the runner-up. Worst: the last ranks.
    """
    own = matrix[split.caption_image, np.arange(matrix.shape[1])]
    others = matrix.copy()
    others[split.caption_image, np.arange(matrix.shape[1])] = -np.inf
    lead = own - others.max(axis=0)
    best, worst = np.argsort(-lead)[:count], np.argsort(-ranks.t2i, kind="stable")[:count]
    return [
        example(kind, int(caption), int(ranks.t2i[caption]), matrix[:, caption], opened, split)
        for kind, captions in (("Best", best), ("Worst", worst))
        for caption in captions
    ]


def example(
    kind: str, caption: int, rank: int, scores: np.ndarray, opened: Opened, split: Split
) -> Example:
    """Return a query with the images it found first, the right one last where it is not there."""
    right = int(split.caption_image[caption])
    found = np.argsort(-scores, kind="stable")[:ANSWERS].tolist()
    shown = found if right in found else [*found, right]
    answers = [
        Answer(read(split.image_files[one]), float(scores[one]), one == right) for one in shown
    ]
    text = split.captions[caption]
    dense = None if split.dense is None else split.dense[right]
    (seen,) = gather_evidence(
        opened.model,
        opened.photo(split.image_files[right], dense).to(opened.device),
        opened.captions([text], dense).to(opened.device),
        read(split.image_files[right]),
        [text],
        [opened.words(text)],
    )
    kept = {branch: kept_panel(seen, branch) for branch in seen.kept}
    return Example(kind, text, rank, answers, kept, pair_sheet(seen).render())


def read(file: str) -> np.ndarray:
    """Return an image file as (H, W, 3) uint8 RGB."""
    return cv2.cvtColor(decode(file), cv2.COLOR_BGR2RGB)


if __name__ == "__main__":
    run_program(main)
