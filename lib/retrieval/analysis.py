"""Where a model fails: ranks query by query, recall by length, wrong pairs, hubs, duplicates."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import write_text_whole
from lib.retrieval.gallery import Gallery
from lib.retrieval.metrics import RECALL_AT, QueryRanks

LENGTH_BINS = (1, 8, 10, 12, 15, 20)  # words of a caption, each bin up to the next
WRONG_PAIRS = 100
TOP_HUBS = 10


def analyse(
    folder: str | Path, gallery: Gallery, matrix: np.ndarray, found: QueryRanks
) -> list[str]:
    """Write ranks, recalls by length and count, wrong pairs, hubs and duplicates as CSV files.

    matrix: (N_images, N_captions). README.md in the folder says what each holds and the main
    numbers, which are returned as lines too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hubs = hub_rows(gallery, matrix)
    twins = duplicate_rows(gallery)
    by_length, by_captions = length_rows(gallery, found), caption_count_rows(gallery, found)
    wrong = wrong_pair_rows(gallery, matrix)
    tables = {
        "ranks.csv": rank_rows(gallery, matrix, found),
        "by_length.csv": by_length,
        "by_captions.csv": by_captions,
        "wrong_pairs.csv": wrong,
        "hubs.csv": hubs,
        "duplicates.csv": twins,
    }
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    lines = summary_lines(gallery, by_length, by_captions, wrong, hubs, twins)
    write_text_whole(folder / "README.md", _page(lines))
    return lines


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same keys as CSV (UTF-8); an empty file where there is none."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def rank_rows(gallery: Gallery, matrix: np.ndarray, found: QueryRanks) -> list[dict[str, Any]]:
    """Return a row a query: its rank, its best right candidate, and the best wrong one."""
    owners, rows = gallery.caption_images, []
    for image, scores in enumerate(matrix):
        own = owners == image
        right = int(np.flatnonzero(own)[np.argmax(scores[own])])
        wrong = int(np.argmax(np.where(own, -np.inf, scores))) if not own.all() else right
        rows.append(
            {
                "direction": "i2t",
                "query": gallery.image_ids[image],
                "rank": int(found.i2t[image]),
                "right": gallery.captions[right],
                "right_score": float(scores[right]),
                "best_wrong": gallery.captions[wrong],
                "best_wrong_score": float(scores[wrong]),
            }
        )
    for caption, owner in enumerate(map(int, owners)):
        scores = matrix[:, caption].copy()
        right_score, scores[owner] = float(scores[owner]), -np.inf
        wrong = int(np.argmax(scores))
        rows.append(
            {
                "direction": "t2i",
                "query": gallery.captions[caption],
                "rank": int(found.t2i[caption]),
                "right": gallery.image_ids[owner],
                "right_score": right_score,
                "best_wrong": gallery.image_ids[wrong],
                "best_wrong_score": float(scores[wrong]),
            }
        )
    return rows


def length_rows(gallery: Gallery, found: QueryRanks) -> list[dict[str, Any]]:
    """Return T2I recall by the number of words of the caption, a row a bin that has any."""
    words = np.array([len(text.split()) for text in gallery.captions])
    bins = np.searchsorted(LENGTH_BINS, words, side="right") - 1
    rows = []
    for index, low in enumerate(LENGTH_BINS):
        chosen = bins == index
        if not chosen.any():
            continue
        last = index + 1 == len(LENGTH_BINS)
        name = f"{low}+" if last else f"{low}-{LENGTH_BINS[index + 1] - 1}"
        rows.append({"words": name, "captions": int(chosen.sum()), **_recalls(found.t2i[chosen])})
    return rows


def caption_count_rows(gallery: Gallery, found: QueryRanks) -> list[dict[str, Any]]:
    """Return I2T and T2I recall by the number of captions of the image."""
    counts = np.bincount(gallery.caption_images, minlength=len(gallery.image_ids))
    rows = []
    for count in np.unique(counts):
        images = counts == count
        i2t = _recalls(found.i2t[images])
        t2i = _recalls(found.t2i[images[gallery.caption_images]])
        rows.append(
            {"captions_per_image": int(count), "images": int(images.sum())}
            | {f"i2t_{key}": value for key, value in i2t.items()}
            | {f"t2i_{key}": value for key, value in t2i.items()}
        )
    return rows


def wrong_pair_rows(
    gallery: Gallery, matrix: np.ndarray, count: int = WRONG_PAIRS
) -> list[dict[str, Any]]:
    """Return the wrong pairs that score highest, best first."""
    n_captions = matrix.shape[1]
    scores = matrix.astype(np.float32)  # a copy
    scores[gallery.caption_images, np.arange(n_captions)] = -np.inf
    flat = scores.ravel()
    count = min(count, int(np.isfinite(flat).sum()))
    best = np.argpartition(-flat, count - 1)[:count] if count else np.empty(0, int)
    rows = []
    for index in best[np.argsort(-flat[best], kind="stable")]:
        image, caption = divmod(int(index), n_captions)
        owner = int(gallery.caption_images[caption])
        rows.append(
            {
                "score": float(flat[index]),
                "image": gallery.image_ids[image],
                "caption": gallery.captions[caption],
                "image_of_caption": gallery.image_ids[owner],
                "score_there": float(matrix[owner, caption]),
            }
        )
    return rows


def hub_rows(gallery: Gallery, matrix: np.ndarray) -> list[dict[str, Any]]:
    """Return how often each image, and each caption, is retrieved at rank 1, most often first."""
    n_images, n_captions = matrix.shape
    images = np.bincount(matrix.argmax(0), minlength=n_images)
    captions = np.bincount(matrix.argmax(1), minlength=n_captions)
    rows = []
    for direction, counts, names in (
        ("t2i", images, gallery.image_ids),
        ("i2t", captions, gallery.captions),
    ):
        for index in np.argsort(-counts, kind="stable"):
            rows.append(
                {"direction": direction, "item": names[index], "at_rank_1": int(counts[index])}
            )
    return rows


def duplicate_rows(gallery: Gallery) -> list[dict[str, Any]]:
    """Return the captions that several images share word for word: queries with several answers."""
    images: dict[str, set[int]] = defaultdict(set)
    for text, image in zip(gallery.captions, map(int, gallery.caption_images), strict=True):
        images[" ".join(text.lower().split())].add(image)
    shared = {text: rows for text, rows in images.items() if len(rows) > 1}
    return [
        {
            "caption": text,
            "images": len(rows),
            "image_ids": " ".join(gallery.image_ids[row] for row in sorted(rows)),
        }
        for text, rows in sorted(shared.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def summary_lines(
    gallery: Gallery,
    by_length: Sequence[dict[str, Any]],
    by_captions: Sequence[dict[str, Any]],
    wrong: Sequence[dict[str, Any]],
    hubs: Sequence[dict[str, Any]],
    twins: Sequence[dict[str, Any]],
) -> list[str]:
    """Return the main numbers as sentences."""
    counts = np.array([row["at_rank_1"] for row in hubs if row["direction"] == "t2i"])
    fair = len(gallery.captions) / len(gallery.image_ids)
    top = ", ".join(f"{row['item']} ({row['at_rank_1']})" for row in hubs[:3])
    lines = [
        "T2I R@1 by words of the caption: "
        + ", ".join(f"{row['words']}: {row['r1']:.1f} ({row['captions']})" for row in by_length),
    ]
    if len(by_captions) > 1:
        lines.append(
            "R@1 by captions an image (I2T, T2I): "
            + ", ".join(
                f"{row['captions_per_image']}: {row['i2t_r1']:.1f}, {row['t2i_r1']:.1f}"
                for row in by_captions
            )
        )
    lines += [
        f"Images never at rank 1: {np.count_nonzero(counts == 0)} of {len(counts)}; the "
        f"{min(TOP_HUBS, len(counts))} most frequent take "
        f"{100 * counts[:TOP_HUBS].sum() / max(1, counts.sum()):.1f} % of the captions "
        f"(each would have {fair:g}): {top}",
        f"Captions that several images share word for word: {len(twins)}",
    ]
    if wrong:
        lines.append(f"Best wrong pair: image {wrong[0]['image']} with “{wrong[0]['caption']}”")
    return lines


def _recalls(found: np.ndarray) -> dict[str, float]:
    recalls = {f"r{k}": 100 * float(np.mean(found <= k)) for k in RECALL_AT}
    return {**recalls, "medr": float(np.median(found))}


def _page(lines: Iterable[str]) -> str:
    return (
        "# Failure analysis\n\n"
        + "\n".join(f"- {line}" for line in lines)
        + "\n\n"
        + "| file | what it holds |\n|---|---|\n"
        "| ranks.csv | every query of both directions, its rank, its best wrong candidate |\n"
        "| by_length.csv | T2I recall by the number of words of the caption |\n"
        "| by_captions.csv | recall by the number of captions of the image |\n"
        f"| wrong_pairs.csv | the {WRONG_PAIRS} wrong pairs that score highest |\n"
        "| hubs.csv | how often each image, and each caption, is retrieved at rank 1 |\n"
        "| duplicates.csv | captions that several images share word for word |\n"
    )
