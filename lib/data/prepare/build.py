"""Photos of any source -> the folder of a data set: images in place, splits, text files."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.data.layout import SPLITS, dense_file, file_stem, image_folder
from lib.data.prepare.duplicates import hash_images, near_groups
from lib.data.prepare.extract import Journal
from lib.data.prepare.photos import Photo, Source, give_ids
from lib.data.prepare.splitting import SplitPlan, draw_splits, split_by_lists
from lib.errors import InputError
from lib.files import read_json, write_json, write_text_whole

MARK = "prepare.json"  # what the folder was made of; "finished" comes last
GROUPS = "near_duplicates.jsonl"
Progress = Callable[[str, int, int], None]  # what, done now, of how many (0: unknown)


@dataclass(frozen=True)
class Options:
    """How a data set is built, whatever it is built from."""

    plan: SplitPlan
    seed: int = 0
    near: int | None = 6  # bits that hashes of near-duplicates may differ in; None does not look
    link: str = "symlink"  # symlink, hardlink or copy
    workers: int = 2
    overwrite: bool = False


@dataclass
class Report:
    """What was built, in sentences and numbers."""

    counts: dict[str, tuple[int, int]]  # images and captions by split
    notes: list[str] = field(default_factory=list)


class Target:
    """The folder of one data set: guarded against being overwritten, resumable."""

    def __init__(self, data_path: Path, dataset: str, settings: dict[str, Any]) -> None:
        self.data_path, self.dataset = data_path, dataset
        self.settings = json.loads(json.dumps(settings))  # as it comes back from the file
        self.folder = data_path / dataset
        self.images = image_folder(data_path, dataset)
        self.work = self.folder / ".prepare"

    def open(self, overwrite: bool) -> bool:
        """Make the folder ready; return False where the very same is finished there already.

        Raises InputError where something else is there and may not be overwritten.
        """
        found = read_json(self.folder / MARK)
        same = found.get("settings") == self.settings
        if found.get("finished") and same and not overwrite:
            return False
        there = self._text_files()
        if not overwrite and (there or found) and (not same or found.get("finished")):
            what = there[0] if there else self.folder / MARK
            raise InputError(
                f"{what} is there already, made otherwise or from other files: choose another "
                "--dataset, or --overwrite 1 writes it anew (dense texts stay)"
            )
        if not same:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.images.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MARK, {"settings": self.settings, "finished": False})
        return True

    def _text_files(self) -> list[Path]:
        stems = [file_stem(self.dataset, split) for split in SPLITS]
        names = [f"{stem}_{what}.txt" for stem in stems for what in ("caps", "ids")]
        paths = [self.folder / name for name in [*names, "id_mapping.json"]]
        return [path for path in paths if path.exists()]

    def journal(self) -> Journal:
        """Return the journal of samples whose images are written already."""
        return Journal(self.work / "samples.jsonl")

    def clear_texts(self) -> None:
        """Remove the text files of an earlier preparation."""
        for path in self._text_files():
            path.unlink()

    def finish(self, report: Report) -> None:
        """Note that all is written."""
        counts = {split: list(numbers) for split, numbers in report.counts.items()}
        mark = {"settings": self.settings, "finished": True, "counts": counts}
        write_json(self.folder / MARK, {**mark, "notes": report.notes})
        shutil.rmtree(self.work, ignore_errors=True)


def build(target: Target, source: Source, options: Options, progress: Progress) -> Report:
    """Put the photos of a source into a data set's folder. Raises InputError for what can't be."""
    notes = list(source.notes)
    photos = [photo for photo in source.photos if photo.captions]
    if len(photos) < len(source.photos):
        notes.append(f"{len(source.photos) - len(photos)} images have no caption and are left out")
    if not photos:
        raise InputError("no image with a caption was found")
    place_images(photos, target.images, options.link, options.overwrite, progress)
    photos = _split(photos, target, options, progress, notes)
    give_ids(photos)
    target.clear_texts()
    report = Report(write_texts(target, photos), notes)
    _warn_of_dense(target, photos, notes)
    target.finish(report)
    return report


def place_images(
    photos: Sequence[Photo], images: Path, link: str, overwrite: bool, progress: Progress
) -> None:
    """Link or copy the image files that lie elsewhere into the image folder."""
    outside = [photo for photo in photos if photo.file is not None]
    for photo in outside:
        _place(photo.file, images / photo.name, link, overwrite)
        progress(f"images ({link})", 1, len(outside))


def _place(file: Path, goal: Path, link: str, overwrite: bool) -> None:
    if not file.exists():
        raise InputError(f"no image file {file}")
    if os.path.lexists(goal):
        if goal.exists() and (goal.samefile(file) or _same_copy(file, goal, link)):
            return
        if not overwrite:
            raise InputError(
                f"{goal} is there already and is another file: choose another --dataset, or "
                "--overwrite 1 puts the new one in its place"
            )
    goal.parent.mkdir(parents=True, exist_ok=True)
    partial = goal.with_name(f".{goal.name}.part")
    partial.unlink(missing_ok=True)
    try:
        if link == "symlink":
            partial.symlink_to(file.resolve())
        elif link == "hardlink":
            os.link(file.resolve(), partial)
        else:
            shutil.copyfile(file, partial)
    except OSError as error:
        way = "" if link == "copy" else "; --link copy makes copies"
        raise InputError(f"{goal} can't be made ({error.strerror}){way}") from None
    os.replace(partial, goal)


def _same_copy(file: Path, goal: Path, link: str) -> bool:
    """Return whether a copy that an earlier call made is there."""
    return link == "copy" and not goal.is_symlink() and goal.stat().st_size == file.stat().st_size


def _split(
    photos: list[Photo], target: Target, options: Options, progress: Progress, notes: list[str]
) -> list[Photo]:
    """Return the photos that belong to a split, with it: given, listed, or drawn by the seed."""
    if options.plan.lists:
        notes += split_by_lists(photos, options.plan.lists)
        photos = [photo for photo in photos if photo.split]
    given = sum(photo.split is not None for photo in photos)
    if 0 < given < len(photos):
        raise InputError(
            f"{given} of {len(photos)} images come with a split and the others without; give all "
            "of them one, or none"
        )
    groups = list(range(len(photos)))
    if options.near is not None:
        photos, groups = _near_duplicates(photos, target, options, progress, notes)
    if not given:
        splits = draw_splits(groups, options.plan.fractions, options.seed)
        for photo, split in zip(photos, splits, strict=True):
            photo.split = split
        shares = "/".join(f"{one:g}" for one in options.plan.fractions)
        notes.append(f"splits drawn by image, {shares}, seed {options.seed}")
    elif options.near is not None:
        notes.append(_across(photos, groups))
    return photos


def _near_duplicates(
    photos: list[Photo], target: Target, options: Options, progress: Progress, notes: list[str]
) -> tuple[list[Photo], list[int]]:
    """Return the photos that decode and the group of each; the groups are written and noted."""
    names = [photo.name for photo in photos]
    hashes = hash_images(
        target.images,
        names,
        target.work / "hashes.jsonl",
        options.workers,
        lambda done: progress("near-duplicates", done, len(names)),
    )
    bad = [name for name, value in hashes.items() if value is None]
    if bad:
        notes.append(f"{len(bad)} images do not decode and are left out ({', '.join(bad[:3])})")
        photos = [photo for photo in photos if hashes[photo.name] is not None]
        if not photos:
            raise InputError(f"no image decodes ({bad[0]} first)")
    groups = near_groups([hashes[photo.name] for photo in photos], options.near).tolist()
    members: dict[int, list[str]] = {}
    for photo, group in zip(photos, groups, strict=True):
        members.setdefault(group, []).append(photo.name)
    several = sorted((one for one in members.values() if len(one) > 1), key=len, reverse=True)
    write_text_whole(target.folder / GROUPS, "".join(json.dumps(one) + "\n" for one in several))
    if several:
        notes.append(
            f"{sum(map(len, several))} images are near-duplicates in {len(several)} groups, the "
            f"largest of {len(several[0])} ({', '.join(several[0][:2])}); all in {GROUPS}"
        )
    else:
        notes.append("no near-duplicates")
    return photos, groups


def _across(photos: Sequence[Photo], groups: Sequence[int]) -> str:
    """Return how many groups of near-duplicates the given splits tear apart."""
    places: dict[int, set[str | None]] = {}
    for photo, group in zip(photos, groups, strict=True):
        places.setdefault(group, set()).add(photo.split)
    torn = sum(len(splits) > 1 for splits in places.values())
    return f"{torn} groups of near-duplicates lie in several of the given splits"


def write_texts(target: Target, photos: Sequence[Photo]) -> dict[str, tuple[int, int]]:
    """Write captions and ids of each split and id_mapping.json; return images and captions."""
    counts = {}
    for split in SPLITS:
        mine = [photo for photo in photos if photo.split == split]
        if not mine:
            continue
        stem = file_stem(target.dataset, split)
        captions = [caption for photo in mine for caption in photo.captions]
        ids = [photo.image_id for photo in mine for _ in photo.captions]
        write_text_whole(target.folder / f"{stem}_caps.txt", "\n".join(captions) + "\n")
        write_text_whole(target.folder / f"{stem}_ids.txt", "\n".join(map(str, ids)) + "\n")
        counts[split] = (len(mine), len(captions))
    mapping = {photo.image_id: photo.name for photo in photos}
    write_text_whole(target.folder / "id_mapping.json", json.dumps(mapping, indent=0) + "\n")
    if "train" not in counts:
        found = Counter(photo.split for photo in photos)
        raise InputError(f"no image is in the training split ({dict(found)})")
    return counts


def _warn_of_dense(target: Target, photos: Sequence[Photo], notes: list[str]) -> None:
    """Note dense texts of an earlier preparation that lie in another split's file now."""
    for split in SPLITS:
        path = dense_file(target.data_path, target.dataset, split)
        if path.exists():
            notes.append(
                f"{path.name} is kept: the same call of tools.describe adds what it lacks now"
            )
