"""Pairs in chunks, chosen pairs, and the two passes of hardest negatives, for every method alike.

A method scores one chunk of pairs at a time (`Method.score`). Here all pairs are cut into such
chunks, so that memory is that of one chunk, and gradient is kept for no more pairs than the loss
reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib.batch import Rows, Tokens, length_buckets
from lib.distributed import gather_sizes, rank, world_size
from lib.model import kernels
from lib.model.precision import without_graph

if TYPE_CHECKING:
    from lib.methods.base import Method

Maps = dict[str, Tensor]  # each (B_v, B_t)

CAPTIONS_WITHOUT_GRAPH = 256  # of a chunk
PAIRS_WITHOUT_GRAPH = 256  # of a chunk on the CPU: what it makes stays near the caches
SPREAD, WIDE_SPREAD = 1.125, 2.0  # of the lengths in a bucket
PAIRS_AT_ONCE = 256  # scored one by one, each with its own copy of the image's patches
MOST_READ = 4  # similarities a pair that are worth scoring twice


@dataclass
class TextBuckets:
    """Captions prepared for scoring, in buckets of like length; `order` is theirs in the whole."""

    buckets: list[Rows]
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)


def bucketed(method: Method, texts: Tokens) -> TextBuckets:
    """Return the captions prepared, in buckets of about one length: no padding is multiplied."""
    most = _most_pairs(method, texts.local.device)
    buckets: list[Rows] = []
    order: list[int] = []
    on_cpu = method.is_fused and texts.local.is_cpu  # there padding costs but the means
    spread = WIDE_SPREAD if on_cpu else SPREAD
    captions = min(most, method.shard_size if torch.is_grad_enabled() else CAPTIONS_WITHOUT_GRAPH)
    if method.is_fused and torch.is_grad_enabled():
        captions, spread = math.isqrt(most), math.inf  # a gradient of all images for each bucket
    for rows in length_buckets(texts.lengths.tolist(), captions, spread):
        alike = texts[rows] if len(rows) < len(texts) else texts
        buckets.append(method.prepare_texts(alike.trimmed()))
        order += rows if alike is not texts else range(len(texts))
    return TextBuckets(buckets, order)


def all_pairs(method: Method, images: Rows, texts: TextBuckets) -> Maps:
    """Return `Method.score` of every pair, columns in the captions' own order.

    A chunk holds at most `shard_size`² pairs; with more than that in all, the backward pass
    computes each chunk again.
    """
    most = _most_pairs(method, images.device)
    again = torch.is_grad_enabled() and len(images) * len(texts) > most
    if not (torch.is_grad_enabled() or method.is_fused) and images.device.type == "cpu":
        most = min(most, PAIRS_WITHOUT_GRAPH)
    columns = []
    for bucket in texts.buckets:
        size = max(1, most // len(bucket))
        chunks = images.split(size) if size < len(images) else [images]
        columns.append(_stacked([_scored(method, chunk, bucket, again) for chunk in chunks], 0))
    maps = _stacked(columns, 1)
    if texts.order == sorted(texts.order):
        return maps
    places = torch.tensor(texts.order, device=images.device).argsort()
    return {key: value[:, places] for key, value in maps.items()}


def chosen_pairs(
    method: Method, images: Rows, texts: Rows, rows: Tensor, columns: Tensor
) -> Tensor:
    """Return the similarity of the pairs (rows[p], columns[p]) alone, (P,)."""
    if method.is_fused:
        return _by_image(method, images, texts, rows, columns)

    def one_pair(image: dict, text: dict) -> Tensor:
        pair = images.refilled(image)[None], texts.refilled(text)[None]
        return method.score(*pair)["similarity"][0, 0]

    def scores(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.vmap(one_pair)(images[rows].tensors(), texts[columns].tensors())

    parts = list(zip(rows.split(PAIRS_AT_ONCE), columns.split(PAIRS_AT_ONCE), strict=True))
    if len(parts) == 1:
        return scores(*parts[0])
    return torch.cat([checkpoint(scores, *part, use_reentrant=False) for part in parts])


def _by_image(method: Method, images: Rows, texts: Rows, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `chosen_pairs` where a kernel scores, an image with its captions at a time."""
    order = rows.argsort(stable=True)
    seen, counts = rows[order].unique_consecutive(return_counts=True)
    captions = texts[columns[order]].split(counts.tolist())
    parts = zip(images[seen].split(1), captions, strict=True)
    scores = torch.cat([method.score(*part)["similarity"][0] for part in parts])
    return scores[order.argsort()]


def loss_maps(method: Method, images: Tokens, texts: Tokens, image_ids: Tensor) -> Maps:
    """Return the maps of the global batch, each (B, B), for this rank's `images`.

    Where the loss reads only the hardest negatives, all pairs are scored without a graph, and the
    similarities that take part in the loss once more with one: at most three a row, but for ties.
    Not so where the backward pass passes over the others by itself.
    """
    prepared = method.prepare_images(images)
    few = method.criterion.reads_few_pairs and method.scores_repeat and torch.is_grad_enabled()
    few = few and not _keeps_little(method, texts)
    if few:
        with without_graph(texts.local.device):
            maps = _gathered(method, prepared, texts)
        pairs = method.criterion.pairs_read(maps["similarity"], image_ids)  # (B, B)
        few = int(pairs.sum()) <= MOST_READ * len(pairs)  # the same on every rank
    if not few:
        return _gathered(method, prepared, texts)
    first = sum(gather_sizes(len(images), texts.local.device)[: rank()])
    rows, columns = pairs[first : first + len(images)].nonzero(as_tuple=True)
    scores = method.pair_scores(prepared, texts, rows, columns)
    # the values of the first pass, so that the loss picks the pairs that were picked here
    gradient = scores.new_zeros(len(images), len(texts))
    gradient = gradient.index_put((rows, columns), scores - scores.detach())
    maps["similarity"] = maps["similarity"] + method.gather(gradient)
    return maps


def with_global_loss(
    method: Method,
    losses: dict[str, Tensor],
    images: Tokens,
    texts: Tokens,
    image_ids: Tensor,
) -> dict[str, Tensor]:
    """Return the losses with that of the global embeddings added, where there is one."""
    if method.global_loss is None:
        return losses
    seen = method.gather(method.global_embeddings(images))  # (B, C)
    added = method.global_loss(seen, method.global_embeddings(texts), image_ids)
    return {**losses, "loss": losses["loss"] + added, "global": added.detach()}


def _keeps_little(method: Method, texts: Tokens) -> bool:
    """Return whether a graph of all pairs holds little, and its backward pass skips what is 0."""
    one_call = len(texts) ** 2 <= _most_pairs(method, texts.local.device)
    return method.is_fused and one_call and world_size() == 1  # several ranks must go one way


def _most_pairs(method: Method, device: torch.device) -> int:
    """Return how many pairs `score` is given at once."""
    if not method.is_fused:
        return method.shard_size**2
    most = kernels.most_pairs(device)
    return max(most, method.shard_size**2) if torch.is_grad_enabled() else most


def _scored(method: Method, images: Rows, texts: Rows, again: bool) -> Maps:
    """Return `score`; with `again` the backward pass computes it anew and nothing is kept."""
    return computed_again(method.score, images, texts) if again else method.score(images, texts)


def computed_again(function: Callable[[Any, Any], Any], images: Rows, texts: Rows) -> Any:
    """Return `function(images, texts)`, of which the backward pass keeps nothing.

    It gets the same noise both times: PyTorch keeps the random state of the devices it finds in the
    arguments, and it looks into dictionaries but not into Rows.
    """

    def refilled(image_rows: dict[str, Any], text_rows: dict[str, Any]) -> Any:
        return function(images.refilled(image_rows), texts.refilled(text_rows))

    return checkpoint(refilled, images.tensors(), texts.tensors(), use_reentrant=False)


def _gathered(method: Method, images: Rows, texts: Tokens) -> Maps:
    maps = method.prepared_maps(images, method.bucketed(texts))
    return {key: method.gather(value) for key, value in maps.items()}


def _stacked(parts: list[Maps], dim: int) -> Maps:
    if len(parts) == 1:
        return parts[0]
    return {key: torch.cat([part[key] for part in parts], dim) for key in parts[0]}
