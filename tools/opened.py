"""What the tools open: a checkpoint that turns photos and texts into batches, and an index."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arguments import fill_paths
from lib.batch import Batch, image_size
from lib.checkpoints.checkpoint import restore_model
from lib.checkpoints.hub import checkpoint_file
from lib.checkpoints.payloads import read_payload
from lib.data.loaders import Collate, eval_loader
from lib.data.sources import EvalImages, Sample
from lib.data.splits import Split
from lib.errors import InputError
from lib.methods.base import Method
from lib.model.encoders import image_filter
from lib.retrieval.index import PictureIndex
from lib.retrieval.result_files import file_digest
from lib.retrieval.search import Searcher
from lib.retrieval.shortlist import saved_shortlist
from vocab import WordTokenizer, checkpoint_tokenizer

ANY_TEXT = "a"  # a dense text where what it says makes no difference
READING = {  # what `data.read_split` and its loaders read, for checkpoints that lack it
    "dataset": "f30k",
    "data_path": "data/",
    "image_path": None,
    "f30k_img_path": None,
    "coco_img_path": None,
    "scenes_size": None,
    "feature_cache": None,
    "batch_size": 64,
}


def add_checkpoint_flags(
    parser: argparse.ArgumentParser, required: bool = True, device: bool = True
) -> None:
    """Add --checkpoint, what official checkpoints need beside it, and unless told not --device."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        required=required,
        help="a model_best.pth, ours or official, a model's folder or hub id",
    )
    group.add_argument("--method", default=None, help="of an official checkpoint")
    group.add_argument("--vit_path", default=None, help="folder with the image config.json")
    group.add_argument("--bert_path", default=None, help="folder with BERT's config and vocabulary")
    if device:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        group.add_argument("--device", default=best, help="cpu, cuda or cuda:N")


@dataclass
class Opened:
    """A model in evaluation mode with all that turns files and texts into its batches."""

    model: Method
    args: argparse.Namespace  # what it was trained with
    tokenizer: WordTokenizer
    device: torch.device
    checkpoint: Path

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint file."""
        return file_digest(self.checkpoint)

    @property
    def dense_words(self) -> int:
        words = self.model.dense_words(self.args, training=False)
        return min(words, getattr(self.model.text_encoder, "max_positions", words))

    def photos(
        self,
        files: Sequence[str],
        dense: Sequence[str] | None = None,
        batch_size: int = 32,
        workers: int = 0,
    ) -> Iterator[tuple[Batch | None, list[int], list[str]]]:
        """Yield (images, their places in `files`, files that can't be decoded) batch by batch."""
        split = Split("folder", "photos", [], list(files), list(files), np.empty(0, int), dense)
        words = self.dense_words if self.model.dense_owner == "image" else None
        images = EvalImages(
            split,
            self.args.img_res,
            self.tokenizer,
            words,
            resample=image_filter(self.model.image_encoder),
        )
        loader = eval_loader(images, batch_size, range(len(images)), workers)
        for batch, bad in loader.tolerant():
            places = [] if batch is None else batch.image_ids.tolist()
            yield batch, places, bad

    def photo(self, file: str | Path, dense: str | None = None) -> Batch:
        """Return one photo as a batch; `dense` is read where images own their dense texts.

        Raises InputError where the photo can't be decoded, or that text is missing.
        """
        if self.model.dense_owner == "image" and dense is None:
            raise InputError(
                f"{self.model.name} reads a dense text with each picture: give that of {file} with "
                "--dense"
            )
        ((batch, _, bad),) = self.photos([str(file)], None if dense is None else [dense])
        if bad:
            raise InputError(f"{file} is no picture that can be decoded: give a JPEG or PNG file")
        return batch

    def blank(self) -> Batch:
        """Return a black image, with a dense text where the model wants one."""
        pixels = torch.zeros(3, *image_size(self.args.img_res), dtype=torch.uint8)
        wanted = self.model.dense_owner == "image"
        words = self.tokenizer.encode(ANY_TEXT, self.dense_words) if wanted else None
        return Collate(self.tokenizer.pad_id)([Sample(0, pixels, dense_ids=words)])[0]

    def captions(self, texts: Sequence[str], dense: str | None = None) -> Batch:
        """Return captions as a batch; `dense` is for a method whose captions carry one."""
        words = None
        if self.model.dense_owner == "caption":
            if dense is None:
                raise InputError(
                    f"{self.model.name} reads a dense text with each caption: give one with --dense"
                )
            words = self.tokenizer.encode(dense, self.dense_words)
        samples = [
            Sample(
                0, ids=self.tokenizer.encode(text, self.args.max_word), dense_ids=words, caption=n
            )
            for n, text in enumerate(texts)
        ]
        return Collate(self.tokenizer.pad_id)(samples)[0]

    def words(self, text: str) -> list[str]:
        """Return the word pieces of a caption as the model reads them, [CLS] and [SEP] included."""
        return [
            self.tokenizer.tokens[one] for one in self.tokenizer.encode(text, self.args.max_word)
        ]


def open_checkpoint(
    checkpoint: str | Path,
    method: str | None = None,
    vit_path: str | None = None,
    bert_path: str | None = None,
    device: str = "cpu",
) -> Opened:
    """Return the opened checkpoint. Raises InputError where that fails, or it reads no pixels."""
    checkpoint = checkpoint_file(checkpoint)
    payload = read_payload(checkpoint)
    model, args = restore_model(checkpoint, payload, method, vit_path, bert_path, device)
    if args.precomp or not model.uses_pixels:
        raise InputError(
            f"{checkpoint} is a model of {'region features' if args.precomp else 'dense texts'}, "
            "and photos are pixels: give the checkpoint of a model that reads those"
        )
    tokenizer = checkpoint_tokenizer(payload, bert_path or args.bert_path)
    return Opened(model, args, tokenizer, torch.device(device), Path(checkpoint))


def open_from_flags(args: argparse.Namespace) -> Opened:
    """Return what --checkpoint and the flags beside it name."""
    return open_checkpoint(args.checkpoint, args.method, args.vit_path, args.bert_path, args.device)


def data_settings(opened: Opened, args: argparse.Namespace) -> argparse.Namespace:
    """Return how a data set is read: as the model was trained, where flags do not say else."""
    settings = argparse.Namespace(**READING)
    vars(settings).update(vars(opened.args))
    settings.workers = 0
    settings.dataset = getattr(args, "dataset", None) or settings.dataset
    if getattr(args, "data_path", None) is not None:
        settings.f30k_img_path = settings.coco_img_path = None  # they lay in the former one
    for name in READING:
        if getattr(args, name, None) is not None:
            setattr(settings, name, getattr(args, name))
    fill_paths(settings)
    return settings


def without_dense_text(opened: Opened, why: str) -> str:
    """Let the model go on without dense texts, and return the sentence that says so.

    Raises InputError where its checkpoint does not allow that.
    """
    hint = "python -m tools.describe makes them, --dense FILE.jsonl hands them in"
    try:
        opened.model.leave_out_dense()
    except InputError as error:
        raise InputError(f"{why} ({hint}), and {error}") from None
    return f"{why} ({hint}): going on as --dense_side none, which finds less than with them"


def open_searcher(args: argparse.Namespace) -> tuple[Searcher, Opened]:
    """Return an index ready for queries, and the model that made it."""
    found = PictureIndex.open(args.index)
    opened = open_index_model(found, args)
    if not len(found):
        raise InputError(f"{args.index} holds no pictures: fill it, python -m tools.search index")
    shortlist = saved_shortlist(found, args.faiss)
    return Searcher(opened.model, found, shortlist, opened.blank(), opened.device), opened


def open_index_model(found: PictureIndex, args: argparse.Namespace) -> Opened:
    """Return the model that made an index.

    Raises InputError where its checkpoint is gone, or is not the one that made it.
    """
    checkpoint = Path(args.checkpoint or found.manifest["checkpoint"])
    if not checkpoint.exists():
        raise InputError(
            f"{checkpoint}, which made {found.folder}, is not there: name it with --checkpoint"
        )
    method = args.method or found.manifest["method"]
    opened = open_checkpoint(checkpoint, method, args.vit_path, args.bert_path, args.device)
    found.check({"checkpoint": str(checkpoint), "checkpoint_sha256": opened.digest})
    if found.manifest["dense_side"] == "none" and opened.model.dense_owner is not None:
        opened.model.leave_out_dense()
    return opened


def query_batch(opened: Opened, text: str) -> Batch:
    """Return the query as a batch. Raises InputError where no word of it is known."""
    pieces = opened.words(text)[1:-1]
    if all(one == "[UNK]" for one in pieces):
        raise InputError(f"no match: the model knows no word of {text!r}")
    return opened.captions([text])
