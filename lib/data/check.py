"""Read a data set once, all of it, and say what training would stumble over."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.images import decode
from lib.data.layout import dense_file, describe_command, file_stem, image_folder
from lib.data.splits import Split, load_split
from lib.errors import InputError

FEWEST_QUOTED = 4  # words of a caption that are a quotation; fewer stand in a text by chance
WAITING = 64  # images read ahead of the one that is looked at


@dataclass
class Lengths:
    """Word pieces of texts, [CLS] and [SEP] included, and the share of texts that is cut."""

    median: int
    most: int  # of 95 in 100 texts
    longest: int
    cut: float  # percent
    limit: int


@dataclass
class SplitReport:
    """What one split holds."""

    name: str
    images: int = 0
    captions: int = 0
    fewest: int = 0  # captions of an image
    most: int = 0
    caption_lengths: Lengths | None = None
    repeated_within: int = 0  # captions that their image has already
    repeated_across: int = 0  # captions that another image of the split has too
    without_file: list[str] = field(default_factory=list)  # files that are not there
    undecodable: list[str] = field(default_factory=list)
    dense: int | None = None  # dense texts, None where there is no file
    dense_lengths: Lengths | None = None
    dense_repeated: int = 0
    dense_quotes: list[str] = field(default_factory=list)  # ids of images
    errors: list[str] = field(default_factory=list)  # sentences of the reader
    dense_error: str | None = None


@dataclass
class Report:
    """What a whole data set holds."""

    dataset: str
    splits: dict[str, SplitReport]
    shared: dict[str, list[str]]  # by pair of splits, images that are in both
    notes: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)  # why training would stop

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What training would do with the data, as far as it decides what stops it."""

    data_path: Path
    dataset: str
    image_path: Path | None = None
    max_word: int = 90
    max_dense_word: int = 90
    needs_dense: bool = True  # in evaluation, and where trains_on_dense is None in training too
    trains_on_dense: bool | None = None
    uses_pixels: bool = True
    val_split: str = "dev"
    max_bad_images: int = 100


def check_data(
    plan: Plan,
    pieces: Callable[[str], int],
    splits: Sequence[str] = ("train", "dev", "test"),
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 2,
) -> Report:
    """Return the report on a data set; `pieces` counts a text's word pieces.

    Splits without files are left out. Every image is read and decoded as in training.
    """
    there = [name for name in splits if _captions_file(plan, name).exists()]
    checked = {name: _check_texts(plan, name, pieces) for name in there}
    reports = {name: report for name, (report, _) in checked.items()}
    loaded = {name: split for name, (_, split) in checked.items() if split is not None}
    prints = _check_images(plan, reports, loaded, progress, workers) if plan.uses_pixels else {}
    report = Report(plan.dataset, reports, _shared(loaded, prints))
    _judge(plan, report)
    return report


def _captions_file(plan: Plan, split: str) -> Path:
    return plan.data_path / plan.dataset / f"{file_stem(plan.dataset, split)}_caps.txt"


# --- texts -------------------------------------------------------------------------------------


def _check_texts(
    plan: Plan, name: str, pieces: Callable[[str], int]
) -> tuple[SplitReport, Split | None]:
    report = SplitReport(name)
    try:
        split = load_split(
            plan.data_path, plan.dataset, name, _image_root(plan), check_images=False
        )
    except InputError as error:
        report.errors.append(str(error))
        return report, None
    each = np.bincount(split.caption_image)
    report.images, report.captions = len(split.image_ids), len(split.captions)
    report.fewest, report.most = int(each.min()), int(each.max())
    report.caption_lengths = _lengths(split.captions, pieces, plan.max_word)
    report.repeated_within, report.repeated_across = _repeats(split)
    _check_dense(plan, split, report, pieces)
    return report, split


def _image_root(plan: Plan) -> Path:
    return plan.image_path or image_folder(plan.data_path, plan.dataset)


def _lengths(texts: Sequence[str], pieces: Callable[[str], int], limit: int) -> Lengths:
    counts = np.array([pieces(text) for text in texts])
    median, most = np.percentile(counts, [50, 95], method="inverted_cdf")
    cut = 100 * float((counts > limit).mean())
    return Lengths(int(median), int(most), int(counts.max()), cut, limit)


def _repeats(split: Split) -> tuple[int, int]:
    """Return captions that repeat within their image, and those that another image has too."""
    pairs = Counter(zip(map(plain_words, split.captions), split.caption_image, strict=True))
    images_of = Counter(text for text, _ in pairs)
    within = sum(count - 1 for count in pairs.values())
    across = sum(count for (text, _), count in pairs.items() if images_of[text] > 1)
    return within, across


def plain_words(text: str) -> str:
    """Return a text's words in lower case, a space between them, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _check_dense(
    plan: Plan, split: Split, report: SplitReport, pieces: Callable[[str], int]
) -> None:
    if not dense_file(plan.data_path, plan.dataset, split.name).exists():
        return
    try:
        whole = load_split(
            plan.data_path,
            plan.dataset,
            split.name,
            _image_root(plan),
            needs_dense=True,
            check_images=False,
        )
    except InputError as error:
        report.dense_error = str(error)
        return
    report.dense = len(whole.dense)
    report.dense_lengths = _lengths(whole.dense, pieces, plan.max_dense_word)
    report.dense_repeated = len(whole.dense) - len(set(whole.dense))
    report.dense_quotes = _quotes(whole)


def _quotes(split: Split) -> list[str]:
    """Return the ids of images whose dense text holds one of their captions word for word."""
    dense = [f" {plain_words(text)} " for text in split.dense]
    found = set()
    for caption, row in zip(split.captions, split.caption_image, strict=True):
        words = plain_words(caption)
        if words.count(" ") + 1 >= FEWEST_QUOTED and f" {words} " in dense[row]:
            found.add(int(row))
    return [split.image_ids[row] for row in sorted(found)]


# --- images ------------------------------------------------------------------------------------


def _check_images(
    plan: Plan,
    reports: dict[str, SplitReport],
    loaded: dict[str, Split],
    progress: Callable[[int, int], None],
    workers: int,
) -> dict[str, list[str | None]]:
    """Read every image; return the digest of each split's files, None for those not there."""
    total = sum(len(split.image_files) for split in loaded.values())
    prints: dict[str, list[str | None]] = {}
    for name, split in loaded.items():
        prints[name] = []
        for file, (digest, good) in _read_all(split.image_files, workers):
            prints[name].append(digest)
            if digest is None:
                reports[name].without_file.append(file)
            elif not good:
                reports[name].undecodable.append(file)
            progress(1, total)
        if not split.image_files:
            mapping = plan.data_path / plan.dataset / "id_mapping.json"
            reports[name].errors.append(f"no file {mapping}, so no image has a file")
    return prints


def _read_all(files: Sequence[str], workers: int) -> Iterator[tuple[str, tuple[str | None, bool]]]:
    """Yield (file, (digest, whether it decodes)) in order; a bounded number is read ahead."""
    with ThreadPoolExecutor(workers) as pool:
        names = iter(files)
        ahead = [(name, pool.submit(_read, name)) for name in islice(names, WAITING)]
        while ahead:
            name, future = ahead.pop(0)
            yield name, future.result()
            ahead += [(one, pool.submit(_read, one)) for one in islice(names, 1)]


def _read(path: str) -> tuple[str | None, bool]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.blake2b(file.read()).hexdigest()
    except OSError:
        return None, False
    return digest, decode(path) is not None


def _shared(loaded: dict[str, Split], prints: dict[str, list[str | None]]) -> dict[str, list[str]]:
    """Return, for each two splits, the images in both: by id, by file, or by the same bytes."""
    marks: dict[str, dict[Any, str]] = {}
    for name, split in loaded.items():
        mine: dict[Any, str] = {("id", one): one for one in split.image_ids}
        mine |= {("file", os.path.normpath(f)): one
                 for f, one in zip(split.image_files, split.image_ids, strict=False)}  # fmt: skip
        mine |= {("bytes", digest): one
                 for digest, one in zip(prints.get(name, []), split.image_ids, strict=False)
                 if digest is not None}  # fmt: skip
        marks[name] = mine
    names = list(loaded)
    shared = {}
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            both = {marks[first][key] for key in marks[first].keys() & marks[second].keys()}
            if both:
                shared[f"{first}, {second}"] = sorted(both)
    return shared


# --- what stops training -----------------------------------------------------------------------


def _judge(plan: Plan, report: Report) -> None:
    """Note why training would stop, and what else one should know."""
    training = report.splits.get("train")
    if training is None:
        report.stops.append(f"no file {_captions_file(plan, 'train')}")
        return
    _judge_split(plan, training, plan.max_bad_images, report.stops)
    bad = len(training.undecodable)
    if 0 < bad <= plan.max_bad_images:
        report.notes.append(f"training leaves out the pairs of {bad} images that do not decode")
    chosen = report.splits.get(plan.val_split)
    lacks_dense = plan.needs_dense and (chosen is None or not _has_dense(plan, chosen))
    if plan.val_split == "dev" and (chosen is None or lacks_dense):
        what = "dense texts of dev" if chosen is not None else "dev split"
        report.notes.append(f"no {what}: training holds some of its images out instead")
    elif chosen is None:
        report.stops.append(f"no file {_captions_file(plan, plan.val_split)}")
    elif chosen is not training:
        _judge_split(plan, chosen, 0, report.stops)
    for name, split in report.splits.items():
        if name not in ("train", plan.val_split):
            found: list[str] = []
            _judge_split(plan, split, 0, found)
            report.notes += [f"evaluation would stop: {one}" for one in found]


def _has_dense(plan: Plan, split: SplitReport) -> bool:
    return dense_file(plan.data_path, plan.dataset, split.name).exists()


def _judge_split(plan: Plan, split: SplitReport, most_bad: int, stops: list[str]) -> None:
    stops += split.errors
    if plan.uses_pixels and split.without_file:
        stops.append(
            f"{split.name}: {len(split.without_file)} image files are missing "
            f"({split.without_file[0]} first)"
        )
    if len(split.undecodable) > most_bad:
        allowed = f", more than --max_bad_images {most_bad}" if most_bad else ""
        stops.append(
            f"{split.name}: {len(split.undecodable)} images do not decode{allowed} "
            f"({split.undecodable[0]} first)"
        )
    needed = plan.needs_dense
    if split.name == "train" and plan.trains_on_dense is not None:
        needed = plan.trains_on_dense
    if not needed or split.errors:
        return
    if split.dense_error is not None:
        stops.append(split.dense_error)
    elif split.dense is None:
        path = dense_file(plan.data_path, plan.dataset, split.name)
        stops.append(
            f"no {path}: {describe_command(plan.data_path, plan.dataset, split.name)} writes it, "
            "--dense_side none does without"
        )
