"""Read a data set once and say what is wrong with it: python -m tools.check_data --dataset NAME.

Takes every flag of train.py, and checks for that training: its method, its lengths, its splits.
Exit code 1 where that training would stop.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from arguments import image_path, parse_train
from lib.data.check import Lengths, Plan, Report, SplitReport, check_data
from lib.data.layout import dataset_folder
from lib.data.splits import load_split
from lib.errors import InputError
from lib.files import check_destination, write_text_whole
from lib.flags import Parser
from lib.methods.registry import get_method
from lib.program import program, run_program
from vocab import WordTokenizer, learn_vocabulary, load_tokenizer

WIDTH = 80
DENSE = "dense texts"
ALL = 1 << 30  # more word pieces than any text has


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Check as the flags say; return the exit code: 0, 1 (training would stop) or 2 (bad input)."""
    own, rest = parser().parse_known_args(argv)
    to_file = own.json not in (None, "-")
    if to_file:
        check_destination(own.json, "--json")
    report = check(parse_train(rest), own.json is not None)
    text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
    if own.json == "-":
        print(text)
    else:
        print(page(report))
        if to_file:
            write_text_whole(Path(own.json), text + "\n")
    return 1 if report.stops else 0


def parser() -> Parser:
    """Return the parser of this tool's own flag; the others are train.py's."""
    own = Parser("tools.check_data", description=__doc__)
    own.add_argument(
        "--json", nargs="?", const="-", default=None, metavar="FILE",
        help="print everything as JSON, or write it into FILE beside the report",
    )  # fmt: skip
    return own


def check(args: argparse.Namespace, quiet: bool = False) -> Report:
    """Return the report for a training with these arguments."""
    if args.precomp:
        raise InputError("--precomp 1: regions are checked when they are read; images are not")
    dataset_folder(args.data_path, args.dataset)
    method = get_method(args.method)
    plan = Plan(
        data_path=Path(args.data_path),
        dataset=args.dataset,
        image_path=Path(image_path(args)),
        max_word=args.max_word,
        max_dense_word=method.dense_words(args, training=True),
        needs_dense=method.wants_dense(args) is not None,
        trains_on_dense=method.trains_on_dense(args),
        uses_pixels=method.uses_pixels,
        val_split=args.val_split,
        max_bad_images=args.max_bad_images,
    )
    pieces, counted = _pieces(args)
    with tqdm(desc="images", unit="img", leave=False, ncols=WIDTH, disable=quiet) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        report = check_data(plan, pieces, progress=show, workers=max(1, min(args.workers, 8)))
    report.notes.insert(0, f"for --method {args.method}; lengths in {counted}")
    return report


def _pieces(args: argparse.Namespace) -> tuple[Callable[[str], int], str]:
    """Return what counts a text's word pieces, and in what words to say so."""
    told = f"word pieces of {args.bert_path}"
    try:
        tokenizer = load_tokenizer(args.bert_path)
    except InputError:
        try:
            captions = load_split(
                args.data_path, args.dataset, "train", check_images=False
            ).captions
        except InputError:
            captions = []
        tokenizer = WordTokenizer(learn_vocabulary(captions))
        if args.bert_path == "tiny":
            told = "word pieces that tiny learns from the training captions"
        else:
            told = f"whole words, as {args.bert_path} is out of reach: a little too short"
    return lambda text: len(tokenizer.encode(text, ALL)), told


# --- the page ----------------------------------------------------------------------------------


def page(report: Report) -> str:
    """Return the report on one screen of 80 columns."""
    splits = list(report.splits.values())
    lines = [_line(report.dataset, [one.name for one in splits]), "-" * WIDTH]
    dense = any(one.dense is not None for one in splits)
    rows = ROWS if dense else ROWS[: 1 + [what for what, _ in ROWS].index(DENSE)]
    lines += [_line(what, [tell(one) for one in splits]) for what, tell in rows]
    lines.append("-" * WIDTH)
    for pair, ids in report.shared.items():
        lines += _wrapped(
            f"{len(ids)} images are in {pair.replace(', ', ' and in ')} ({_few(ids)})"
        )
    if not report.shared:
        lines.append("no image is in two splits")
    for note in report.notes:
        lines += _wrapped(note)
    for stop in report.stops[:3]:
        lines += _wrapped(f"training would stop: {stop}")
    if report.stops[3:]:
        lines.append(f"and for {len(report.stops) - 3} more reasons; --json has all")
    if not report.stops:
        lines.append("training would not stop on this data")
    return "\n".join(lines)


def _line(what: str, cells: Sequence[str]) -> str:
    return (what.ljust(35) + "".join(cell.rjust(15) for cell in cells)).rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")


def _captions_each(one: SplitReport) -> str:
    return f"{one.fewest}" if one.fewest == one.most else f"{one.fewest} to {one.most}"


def _pieces_cell(lengths: Lengths | None) -> str:
    return "" if lengths is None else f"{lengths.median}/{lengths.most}/{lengths.longest}"


def _cut_cell(lengths: Lengths | None) -> str:
    return "" if lengths is None else f"{lengths.cut:.1f} %"


def _dense_cell(one: SplitReport) -> str:
    if one.dense_error is not None:
        return "not usable"
    return "none" if one.dense is None else f"{one.dense:,}"


ROWS: list[tuple[str, Callable[[SplitReport], str]]] = [
    ("images", lambda one: f"{one.images:,}"),
    ("captions", lambda one: f"{one.captions:,}"),
    ("captions an image", _captions_each),
    ("files that are missing", lambda one: f"{len(one.without_file):,}"),
    ("files that do not decode", lambda one: f"{len(one.undecodable):,}"),
    ("word pieces: median/95 %/longest", lambda one: _pieces_cell(one.caption_lengths)),
    ("cut at --max_word", lambda one: _cut_cell(one.caption_lengths)),
    ("captions twice for one image", lambda one: f"{one.repeated_within:,}"),
    ("captions that another image has", lambda one: f"{one.repeated_across:,}"),
    (DENSE, _dense_cell),
    ("word pieces: median/95 %/longest", lambda one: _pieces_cell(one.dense_lengths)),
    ("cut at --max_dense_word", lambda one: _cut_cell(one.dense_lengths)),
    ("dense texts that repeat", lambda one: f"{one.dense_repeated:,}" if one.dense else ""),
    (
        "dense texts that quote a caption",
        lambda one: f"{len(one.dense_quotes):,}" if one.dense else "",
    ),
]


if __name__ == "__main__":
    run_program(main)
