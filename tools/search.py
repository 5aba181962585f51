"""Search your own pictures: python -m tools.search index|query|merge; see docs/tools.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from lib.batch import Batch
from lib.data.dense_texts import parse_dense
from lib.errors import InputError
from lib.files import text_lines
from lib.flags import Parser
from lib.program import program, run_program
from lib.retrieval.compaction import DEAD_AT_MOST, compact
from lib.retrieval.index import Part, PictureIndex, Plan, find_pictures, merge_indices
from lib.retrieval.records import STORES
from lib.retrieval.search import (
    QUERY_MAP,
    SHORTLIST,
    Hit,
    Searcher,
    fill_index,
    matches_dense,
    vector_dimension,
)
from lib.retrieval.shortlist import KINDS, saved_shortlist
from tools.opened import (
    ANY_TEXT,
    Opened,
    add_checkpoint_flags,
    open_from_flags,
    open_index_model,
    open_searcher,
    query_batch,
    without_dense_text,
)

CHECKED_AMONG = 1000  # pictures outside the shortlist that are scored to see what it missed
CAPTIONS_AT_ONCE = 128
FITTED_TO = 192  # captions
ARRAY = "ID", "COUNT", "MIN", "MAX"  # ends of Slurm's variables of an array's task


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the subcommand says; return the exit code: 0, or 2 for bad input."""
    args = parser().parse_args(argv)
    {"index": index, "query": query, "merge": merge}[args.command](args)
    return 0


def parser() -> Parser:
    """Return the parser of the three subcommands."""
    whole = Parser("tools.search", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True)
    _add_index(commands.add_parser("index", help="read a folder of pictures into an index"))
    _add_query(commands.add_parser("query", help="find pictures, or captions for a picture"))
    one = commands.add_parser("merge", help="make one index of parts, and its shortlist")
    one.add_argument("indices", nargs="+", metavar="INDEX")
    one.add_argument("--out", default=None, help="folder of the merged index; not for one INDEX")
    _add_shortlist(one)
    add_checkpoint_flags(one, required=False)
    return whole


def _add_shortlist(one: argparse.ArgumentParser) -> None:
    one.add_argument("--faiss", default="auto", choices=KINDS, help="kind of shortlist")
    one.add_argument(
        "--captions",
        default=None,
        metavar="FILE",
        help="captions, one a line, that the shortlist is fitted to; default: those of training",
    )


def _add_index(one: argparse.ArgumentParser) -> None:
    one.add_argument("folder", metavar="FOLDER", help="pictures, in folders of any depth")
    one.add_argument("--out", required=True, metavar="INDEX", help="folder of the index")
    add_checkpoint_flags(one)
    one.add_argument("--dense", default=None, metavar="FILE", help=".jsonl of dense texts")
    one.add_argument("--store", default="float16", choices=STORES, help="patch features")
    _add_shortlist(one)
    one.add_argument(
        "--compact",
        action="store_true",
        help="give back the room of every changed or deleted picture; else from "
        f"{100 * DEAD_AT_MOST:.0f}%% of the rows on",
    )
    one.add_argument(
        "--part",
        default=None,
        metavar="i/n",
        help="this process's share, from 1; default: as torchrun or a Slurm array says",
    )
    one.add_argument("--batch_size", type=int, default=32, help="images at once")
    one.add_argument("--workers", type=int, default=1, help="processes that decode pictures")


def _add_query(one: argparse.ArgumentParser) -> None:
    one.add_argument("index", metavar="INDEX")
    one.add_argument("text", nargs="?", default=None, help="what to look for")
    one.add_argument("--image", default=None, metavar="FILE", help="similar pictures instead")
    one.add_argument(
        "--captions", default=None, metavar="FILE", help="with --image: its best lines instead"
    )
    one.add_argument("--dense", default=None, metavar="TEXT", help="dense text of --image")
    one.add_argument("--top", type=int, default=10, help="results shown")
    one.add_argument(
        "--check", type=int, default=CHECKED_AMONG, help="0: don't check the shortlist"
    )
    one.add_argument("--faiss", default="auto", choices=KINDS, help="the shortlist's index")
    one.add_argument("--json", action="store_true", help="print JSON lines")
    add_checkpoint_flags(one, required=False)


# --- index -------------------------------------------------------------------------------------


def index(args: argparse.Namespace) -> None:
    """Bring an index up to date with its folder."""
    folder = Path(args.folder).resolve()
    if not folder.is_dir():
        raise InputError(f"no folder {args.folder}")
    part = read_part(args.part)
    opened = open_from_flags(args)
    dense = read_dense(args.dense) if args.dense else None
    prepare_dense(opened, dense)
    facts = manifest(opened, folder, args.store)
    found = PictureIndex.create(args.out, facts)
    with found.writing(part):
        found.refresh()
        plan = found.plan(find_pictures(folder), part)
        print(_planned(plan, part))
        read_pictures(opened, found, plan, part, dense, args)
    if part.count == 1:
        finish(found, opened, args)
    else:
        print(
            f"part {part.number}/{part.count} is done: after the last one, python -m tools.search"
        )
        print(f"merge {args.out} builds the shortlist (a first query does it too)")


def finish(found: PictureIndex, opened: Opened, args: argparse.Namespace) -> None:
    """Give back superseded rows, build the shortlist, fit it to captions where some are at hand."""
    dropped = compact(found, 0.0 if getattr(args, "compact", False) else DEAD_AT_MOST)
    if dropped is None:
        print("another process writes to the index: superseded rows stay until a later time")
    elif dropped:
        print(f"the rows of {dropped} changed or deleted pictures were given back")
    shortlist = saved_shortlist(found, args.faiss)
    print(f"{len(found)} pictures in {found.folder}, shortlist {shortlist.kind}")
    fitted = (found.folder / QUERY_MAP).exists() and not args.captions
    if len(found) <= SHORTLIST or fitted:
        return
    file = args.captions or training_captions(opened)
    if file is None:
        print("no captions to fit the shortlist to: --captions FILE makes it keep more of the best")
        return
    lines = [line.strip() for line in text_lines(Path(file), "give a caption a line")]
    lines = [line for line in lines if line]
    started = time.perf_counter()
    chosen = random.Random(0).sample(lines, min(FITTED_TO, len(lines)))
    Searcher(opened.model, found, shortlist, opened.blank(), opened.device).fit(
        opened.captions(chosen)
    )
    seconds = time.perf_counter() - started
    print(f"shortlist fitted to {len(chosen)} captions of {file} in {seconds:.1f} s")


def training_captions(opened: Opened) -> Path | None:
    """Return the caption file that the model was trained on, where it is still there."""
    args = opened.args
    if not getattr(args, "data_path", None):
        return None
    file = Path(args.data_path) / args.dataset / "train_caps.txt"
    return file if file.exists() else None


def read_pictures(
    opened: Opened,
    found: PictureIndex,
    plan: Plan,
    part: Part,
    dense: dict[str, str] | None,
    args: argparse.Namespace,
) -> None:
    """Encode the plan's pictures into the index, naming those that can't be decoded."""
    texts = None
    if dense is not None and opened.model.dense_owner == "image":
        missing = [path for path in plan.to_read if path not in dense]
        if missing:
            raise InputError(
                f"{args.dense} has no dense text for {len(missing)} pictures, the first "
                f"{missing[0]}: python -m tools.describe goes on where it stopped"
            )
        texts = [dense[path] for path in plan.to_read]
    files = [str(found.picture_folder / path) for path in plan.to_read]
    bad: list[str] = []
    started = time.perf_counter()

    def batches() -> Iterator[tuple[Batch | None, list[int]]]:
        for batch, places, broken in opened.photos(files, texts, args.batch_size, args.workers):
            for path in broken:
                tqdm.write(f"skipped, can't be decoded: {path}")
            bad.extend(broken)
            yield batch, places

    with tqdm(total=len(files), unit=" pictures", ncols=80, leave=False) as bar:
        read = fill_index(
            opened.model, found, plan, part, batches(), opened.device, bar.update, texts
        )
    seconds = time.perf_counter() - started
    if read:
        print(f"{read} pictures in {seconds:.1f} s, {read / seconds:.1f} a second")
    if bad:
        print(f"{len(bad)} pictures can't be decoded and were skipped, the first {bad[0]}")


def _planned(plan: Plan, part: Part) -> str:
    changed = len(plan.to_read) - plan.new
    share = "" if part.count == 1 else f"part {part.number}/{part.count}: "
    return (
        f"{share}{plan.new} new pictures, {changed} changed, {len(plan.gone)} deleted, "
        f"{plan.unchanged} unchanged"
    )


def manifest(opened: Opened, folder: Path, store: str) -> dict:
    """Return what an index says of itself: where from, by which model, how kept."""
    return {
        "folder": str(folder),
        "checkpoint": str(opened.checkpoint.resolve()),
        "checkpoint_sha256": opened.digest,
        "method": opened.model.name,
        "dense_side": opened.model.dense_owner or "none",
        "img_res": opened.args.img_res,
        "store": store,
        "dimension": vector_dimension(opened.model, opened.blank(), opened.device),
    }


def prepare_dense(opened: Opened, dense: dict[str, str] | None) -> None:
    """Let a model that reads dense texts do without where there are none, and say so."""
    owner = opened.model.dense_owner
    if owner == "caption":
        why = "this checkpoint reads a dense text with each caption, and a search has none"
        print(without_dense_text(opened, why))
    elif owner == "image" and dense is None:
        why = "this checkpoint reads a dense text of each picture, and there are none"
        print(without_dense_text(opened, why))


def read_dense(path: str) -> dict[str, str]:
    """Return the dense texts of a .jsonl file by the picture's path in its folder."""
    way_out = "python -m tools.describe makes such files"
    texts = {}
    for number, line in enumerate(text_lines(Path(path), way_out), start=1):
        record = parse_dense(line, f"{path}:{number}")
        if not isinstance(record.get("file_name"), str):
            raise InputError(f"{path}:{number}: no file_name; {way_out}")
        texts[record["file_name"]] = record["text"]
    return texts


def read_part(text: str | None) -> Part:
    """Return this process's share: as given, else as torchrun or a Slurm array numbers it."""
    env = os.environ
    if text is None and int(env.get("WORLD_SIZE", 1)) > 1:
        return Part(int(env["RANK"]) + 1, int(env["WORLD_SIZE"]))
    if text is None and "SLURM_ARRAY_TASK_COUNT" in env:
        return _part_of_array(*(int(env.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in ARRAY))
    number, _, count = (text or "1/1").partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--part {text}: give i/n with i from 1 to n, as 2/8")
    return Part(int(number), int(count))


def _part_of_array(task: int, count: int, first: int, last: int) -> Part:
    """Return the share of one task of an array whose numbers have no gaps; InputError with gaps."""
    if last and last - first + 1 != count:
        raise InputError(
            f"the Slurm array has {count} tasks numbered {first} to {last}, some left out, so that "
            "none would take their pictures: submit the whole array again, which reads what is "
            "missing alone, or give --part i/n"
        )
    return Part(task - first + 1, count)


def merge(args: argparse.Namespace) -> None:
    """Make one index of several, or build the shortlist of one whose parts are all there."""
    sources = [PictureIndex.open(one) for one in args.indices]
    if len(sources) > 1 and args.out is None:
        raise InputError("merging several indices needs --out, the folder of the new one")
    whole = sources[0] if args.out is None else merge_indices(sources, args.out)
    finish(whole, open_index_model(whole, args), args)


# --- query -------------------------------------------------------------------------------------


def query(args: argparse.Namespace) -> None:
    """Print what was found, best first."""
    if (args.text is None) == (args.image is None):
        raise InputError("give either a text to look for or --image FILE")
    searcher, opened = open_searcher(args)
    if args.captions:
        return print_captions(searcher, opened, args)
    started = time.perf_counter()
    if args.image:
        dense = args.dense
        if dense is None and not matches_dense(opened.model):
            dense = ANY_TEXT  # no global vector depends on it
        hits = searcher.similar(opened.photo(args.image, dense), args.top)
    else:
        batch = query_batch(opened, args.text)
        searcher.find(batch, args.top)  # the first one loads what is loaded once
        started = time.perf_counter()
        hits = searcher.find(batch, args.top)
    seconds = time.perf_counter() - started
    print_hits(hits, args.json)
    if args.json:
        return None
    kind = "cosine of global vectors" if args.image else f"similarity of {opened.model.name}"
    print(f"{len(searcher.index)} pictures, {1000 * seconds:.0f} ms, score: {kind}")
    if args.text and args.check:
        print(check_sentence(searcher, batch, args))
    return None


def print_hits(hits: Sequence[Hit], as_json: bool) -> None:
    """Print a line a picture: rank, score, path."""
    for rank, hit in enumerate(hits, start=1):
        if as_json:
            print(json.dumps({"rank": rank, "score": hit.score, "path": hit.path}))
        else:
            print(f"{rank:3}  {hit.score:7.4f}  {hit.path}")


def check_sentence(searcher: Searcher, batch: Batch, args: argparse.Namespace) -> str:
    """Return how much of the exact top the shortlist kept, measured on this query."""
    found = searcher.kept(batch, args.top, args.check)
    if not found.left:
        return f"all {len(searcher.index)} pictures were scored exactly"
    share = "all" if found.others == found.left else f"a sample of {found.others}"
    return (
        f"shortlist of {SHORTLIST}: kept {found.kept} of the exact top {found.top}, "
        f"checked against {share} of the {found.left} others"
    )


def print_captions(searcher: Searcher, opened: Opened, args: argparse.Namespace) -> None:
    """Print the lines of a caption file that fit a photo best."""
    if not args.image:
        raise InputError("--captions goes with --image: its lines are ranked for that photo")
    lines = [one for one in text_lines(Path(args.captions), "give a text file, a caption a line")]
    lines = [one.strip() for one in lines if one.strip()]
    if not lines:
        raise InputError(f"{args.captions} holds no captions")
    batches = (
        opened.captions(lines[first : first + CAPTIONS_AT_ONCE])
        for first in range(0, len(lines), CAPTIONS_AT_ONCE)
    )
    photo = opened.photo(args.image, args.dense)
    found = searcher.captions_for(photo, batches, args.top)
    for rank, (place, score) in enumerate(found, start=1):
        print(f"{rank:3}  {score:7.4f}  {lines[place]}")


if __name__ == "__main__":
    run_program(main)
