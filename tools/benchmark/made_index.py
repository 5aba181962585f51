"""An index of made pictures, of real sizes and any number, for measuring a search.

A picture's patches and a caption's words are noise around some of 64 topics, so that there is
something to find. Records are made for `DISTINCT` pictures; further entries have vectors of their
own near those of one, and its record as a hard link: 100,000 records would be 20 GB.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib.batch import Batch, Tokens, length_mask
from lib.methods.base import Method
from lib.retrieval.index import Part, Picture, PictureIndex, entry_line
from lib.retrieval.search import SHARD_PICTURES, encode_records, vector_dimension
from tools.benchmark.lengths import draw_lengths
from tools.benchmark.step import StepCase

DISTINCT = 4 * SHARD_PICTURES
TOPICS, STRENGTH = 64, 0.7  # of a topic beside noise of deviation 1
OF_PICTURE, OF_CAPTION = 4, 2
AT_ONCE = 64
APART = 0.5  # how far an entry's vector lies from its record's, in deviations of all vectors
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    """What is made: a model with random weights, its pictures and captions; the seed says which."""

    method: str
    store: str
    entries: int
    encoders: str = "base"
    embed_size: int = 512
    seed: int = 0

    def model(self) -> Method:
        """Return the model, without dense texts; a caption's words are made, at the usual price."""
        case = StepCase(self.method, "sum", 1, self.encoders, self.embed_size, seed=self.seed)
        model = case.model().eval()
        if model.dense_owner is not None:
            model.leave_out_dense()
        model.text_encoder = MadeWords(model.text_encoder, self)
        return model

    @property
    def side(self) -> int:
        """Height and width of its pictures in pixels."""
        return StepCase(self.method, "sum", 1, self.encoders).side

    def blank(self) -> Batch:
        """Return a black picture."""
        return Batch(pixels=torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8))

    def caption(self, *numbers: int) -> Batch:
        """Return captions by their numbers as a batch; the first word id of each is its number."""
        lengths = torch.tensor([draw_lengths("caption", 1, self.seed + one)[0] for one in numbers])
        ids = torch.full((len(numbers), int(lengths.max())), 1000)
        ids[:, 0] = torch.tensor(numbers)
        return Batch(ids=ids, lengths=lengths)

    def topics(self) -> Tensor:
        """Return the topics, (TOPICS, C)."""
        return STRENGTH * torch.randn(TOPICS, self.embed_size, generator=self.generator(0))

    def images(self, first: int, count: int, patches: int, cls: bool) -> Tokens:
        """Return the tokens of some pictures."""
        random = self.generator(1, first)
        own = torch.randint(TOPICS, (count, OF_PICTURE), generator=random)  # (B, 4)
        which = torch.randint(OF_PICTURE, (count, patches), generator=random)
        shown = torch.rand(count, patches, 1, generator=random) < 0.5
        topics = self.topics()
        local = torch.randn(count, patches, self.embed_size, generator=random)
        local += topics[own.gather(1, which)] * shown  # (B, L, C)
        mean = topics[own].mean(1, keepdim=True)
        mean = mean + 0.5 * torch.randn(mean.shape, generator=random)
        mask = torch.ones(local.shape[:2], dtype=torch.bool)
        return Tokens(local, mask, mean if cls else None)

    def words(self, number: int, width: int) -> Tensor:
        """Return the words of a caption, (width, C)."""
        random = self.generator(2, number)
        own = torch.randint(TOPICS, (OF_CAPTION,), generator=random)
        which = own[torch.randint(OF_CAPTION, (width,), generator=random)]
        return self.topics()[which] + torch.randn(width, self.embed_size, generator=random)

    def generator(self, kind: int, number: int = 0) -> torch.Generator:
        """Return the random numbers of one thing, whatever was drawn before."""
        return torch.Generator().manual_seed(hash((self.seed, kind, number)) % 2**63)


class MadeWords(nn.Module):
    """A text encoder that reads the ids, and hands out the words of made captions."""

    def __init__(self, encoder: nn.Module, made: Made) -> None:
        super().__init__()
        self.encoder = encoder
        self.made = made

    def forward(self, ids: Tensor, lengths: Tensor) -> Tokens:
        self.encoder(ids, lengths)
        words = torch.stack([self.made.words(one, ids.shape[1]) for one in ids[:, 0].tolist()])
        return Tokens(words, length_mask(lengths, ids.shape[1]))


def make_index(folder: Path, made: Made, model: Method) -> PictureIndex:
    """Return the index, written into a new folder."""
    manifest = {
        "folder": str(folder),
        "checkpoint": "made",
        "checkpoint_sha256": "made",
        "method": made.method,
        "dense_side": "none",
        "img_res": made.side,
        "store": made.store,
        "dimension": vector_dimension(model, made.blank(), CPU),
    }
    index = PictureIndex.create(folder, manifest)
    distinct = min(made.entries, DISTINCT)
    for first in range(0, distinct, SHARD_PICTURES):
        _add_made(index, made, model, first, min(SHARD_PICTURES, distinct - first))
    index.refresh()
    if made.entries > distinct:
        _add_linked(index, made)
    index.refresh()
    return index


def _add_made(index: PictureIndex, made: Made, model: Method, first: int, count: int) -> None:
    """Write a shard of pictures that are made."""
    encoder = model.image_encoder
    vectors, records = [], []
    for start in range(first, first + count, AT_ONCE):
        size = min(AT_ONCE, first + count - start)
        images = made.images(start, size, encoder.num_patches, encoder.has_cls)
        one, other = encode_records(model, images, made.store)
        vectors.append(one)
        records.append(other)
    pictures = [Picture(f"{number:07d}.jpg") for number in range(first, first + count)]
    index.add_shard(Part(), pictures, np.concatenate(vectors), np.concatenate(records))


def _add_linked(index: PictureIndex, made: Made) -> None:
    """Write shards of entries whose records are links to those that are there."""
    known, rng = index.vectors, np.random.default_rng(made.seed)
    spread = APART * known.std(0)
    sources = [index.folder / "shards" / shard for shard in index.shards]
    for number, first in enumerate(range(len(known), made.entries, SHARD_PICTURES)):
        count = min(SHARD_PICTURES, made.entries - first)
        place = number % len(sources)
        near = known[place * SHARD_PICTURES :][:count]
        vectors = near + spread * rng.standard_normal(near.shape)
        shard = index.folder / "shards" / f"{len(sources) + number + 1:06d}-part1of1"
        shard.mkdir()
        pictures = [Picture(f"{one:07d}.jpg") for one in range(first, first + count)]
        (shard / "entries.jsonl").write_text("".join(map(entry_line, pictures)), encoding="utf-8")
        np.save(shard / "vectors.npy", vectors.astype(np.float32))
        os.link(sources[place] / "records.npy", shard / "records.npy")


def forget_files(index: PictureIndex) -> bool:
    """Have the system forget the records it holds in memory; return whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for shard in index.shards[: DISTINCT // SHARD_PICTURES]:
        with open(index.folder / "shards" / shard / "records.npy", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
