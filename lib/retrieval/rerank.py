"""Re-ranking: a shortlist by global embeddings, the exact similarity on its N best alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.batch import Batch, Tokens
from lib.distributed import world_size
from lib.errors import InputError, NonFiniteError
from lib.methods.base import Method
from lib.retrieval.evaluation import Carried, SplitLoaders
from lib.retrieval.metrics import DIRECTIONS, RECALL_AT, QueryRanks, ranks
from lib.retrieval.progress import progress_bar
from lib.retrieval.similarity import encode_batches

SAMPLED = 100  # queries of a direction whose exact best are looked up, to tell what was kept


@dataclass(frozen=True)
class Reranked:
    """Approximate ranks, and what the shortlist left of the exact best candidates."""

    ranks: QueryRanks
    kept: dict[str, dict[int, float]]  # direction -> K -> percent of the exact top K
    sampled: dict[str, int]  # direction -> queries that `kept` was measured on
    pairs: int  # scored exactly, those of `kept` not among them
    carried: tuple[bool, bool]  # a dense text beside images, beside captions


@torch.inference_mode()
def rerank_split(
    model: Method,
    loaders: SplitLoaders,
    device: torch.device,
    autocast: Callable,
    shortlist: int,
    show_progress: bool = True,
) -> Reranked:
    """Return approximate ranks: each query's `shortlist` best by cosine of means, scored exactly.

    What is not on the list ranks behind it, by cosine. Raises InputError for several processes and
    for a method whose images and captions have no common global embedding.
    """
    if world_size() > 1:
        raise InputError("--rerank works in one process: leave out --multi_gpu")
    model.eval()
    carried = Carried()

    def encoded(what: str, encode: Callable, batches: Iterable[Batch], total: int) -> list[Tokens]:
        with progress_bar(what, total, shown=show_progress) as bar:
            watched = carried.watch(what, batches)
            return encode_batches(encode, watched, device, autocast, bar.update)

    count = len(loaders.caption_images)
    text_parts = encoded("captions", model.encode_text_batch, loaders.captions, count)
    images = encoded("images", model.encode_image_batch, loaders.images, loaders.num_images)
    cosines = global_cosines(model, images, text_parts)  # (N_images, N_captions)
    texts = Tokens.cat(text_parts)
    lists = shortlists(cosines, shortlist)
    wanted = lists["i2t"] | lists["t2i"]
    exact = np.zeros_like(cosines)
    with progress_bar("pairs", int(wanted.sum()), shown=show_progress) as bar:
        for row, image in enumerate(_one_by_one(images)):
            columns = np.flatnonzero(wanted[row])
            if len(columns):
                exact[row, columns] = _scores(model, image, texts[columns.tolist()], autocast)[0]
            bar.update(len(columns))
    if not np.isfinite(exact).all():
        raise NonFiniteError("some similarities of the shortlists are not finite")
    found = shortlist_ranks(exact, cosines, lists, loaders.caption_images)
    kept, sampled = _kept(model, images, texts, lists, autocast)
    return Reranked(found, kept, sampled, int(wanted.sum()), carried.anywhere())


def global_cosines(model: Method, images: list[Tokens], texts: list[Tokens]) -> np.ndarray:
    """Return the cosine of all global embeddings, (N_images, N_captions) float32."""
    sides = [
        torch.cat([model.global_embeddings(part) for part in side]) for side in (images, texts)
    ]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise InputError(
            f"--rerank: {model.name} has no global embedding that images and captions share "
            f"({sides[0].shape[1]} and {sides[1].shape[1]} channels); evaluate without it"
        )
    left, right = (normalize(side.float(), dim=-1) for side in sides)
    return (left @ right.T).cpu().numpy()


def shortlists(cosines: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return each direction's shortlists as a bool matrix: of each row, of each column."""
    found = {}
    for way, scores in (("i2t", cosines), ("t2i", cosines.T)):
        size = min(count, scores.shape[1])
        best = np.argpartition(-scores, size - 1, axis=1)[:, :size]
        chosen = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(chosen, best, True, axis=1)
        found[way] = chosen if way == "i2t" else chosen.T
    return found


def shortlist_ranks(
    exact: np.ndarray,
    cosines: np.ndarray,
    lists: dict[str, np.ndarray],
    caption_images: np.ndarray,
) -> QueryRanks:
    """Return the ranks where a query's list goes by `exact` and all behind it by `cosines`."""
    low = float(exact.min()) - 3  # cosines lie in [-1, 1]: all of them end up below any exact score
    ordered = {way: np.where(lists[way], exact, low + cosines) for way in DIRECTIONS}
    i2t, _, _ = ranks(ordered["i2t"], caption_images)
    _, t2i, ties = ranks(ordered["t2i"], caption_images)
    return QueryRanks(i2t, t2i, np.asarray(caption_images), ties=ties)


def kept_share(exact: np.ndarray, listed: np.ndarray) -> dict[int, float]:
    """Return the percent of each query's exact best K candidates on its list, (queries, items)."""
    order = np.argsort(-exact, axis=1, kind="stable")
    return {
        k: 100 * float(np.take_along_axis(listed, order[:, :k], axis=1).mean()) for k in RECALL_AT
    }


def _kept(
    model: Method,
    images: list[Tokens],
    texts: Tokens,
    lists: dict[str, np.ndarray],
    autocast: Callable,
) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    rows = _spread(sum(map(len, images)))
    columns = _spread(len(texts))
    chosen = [image for row, image in enumerate(_one_by_one(images)) if row in set(rows)]
    by_image = np.concatenate([_scores(model, image, texts, autocast) for image in chosen])
    few = texts[columns]
    by_caption = np.concatenate([_scores(model, part, few, autocast) for part in images]).T
    kept = {
        "i2t": kept_share(by_image, lists["i2t"][rows]),
        "t2i": kept_share(by_caption, lists["t2i"].T[columns]),
    }
    return kept, {"i2t": len(rows), "t2i": len(columns)}


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, SAMPLED)).round().astype(int).tolist()


def _one_by_one(parts: list[Tokens]) -> Iterator[Tokens]:
    for part in parts:
        for row in range(len(part)):
            yield part[row : row + 1]


def _scores(model: Method, images: Tokens, texts: Tokens, autocast: Callable) -> np.ndarray:
    with autocast():
        found: Tensor = model.similarity(images, texts)
    return found.float().cpu().numpy()
