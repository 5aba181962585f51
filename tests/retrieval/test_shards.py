"""A killed evaluation goes on from the rows that it had finished."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arguments import parse_eval
from lib.batch import Batch
from lib.data.splits import Split
from lib.retrieval.evaluation import SplitLoaders, score_split
from lib.retrieval.gallery import Gallery
from lib.retrieval.result_files import CHANGES
from lib.retrieval.shards import RowStore
from scoring import Member, _row_store
from tests.helpers import pair_inputs, tiny_model

CPU = torch.device("cpu")
MADE_FROM = {"checkpoint": "abc", "data": {"captions": 6}}


class Images(list):
    """Batches that count how many images were read, and stop where told."""

    def __init__(self, batches, stop_at=None):
        super().__init__(batches)
        self.read, self.stop_at = [], stop_at

    def after(self, count):
        assert count % 2 == 0
        rest = Images(self[count // 2 :], self.stop_at)
        rest.read = self.read
        return rest

    def __iter__(self):
        for batch in super().__iter__():
            if len(self.read) == self.stop_at:
                raise KeyboardInterrupt
            self.read.append(len(batch.pixels))
            yield batch


def loaders(stop_at=None):
    inputs = pair_inputs(method="laps")
    pixels = inputs["pixels"]
    images = Images([Batch(pixels=pixels[i : i + 2]) for i in (0, 2, 4)], stop_at)
    captions = [Batch(ids=inputs["ids"], lengths=inputs["lengths"])]
    return SplitLoaders(images, captions, np.arange(6), 6)


def test_a_killed_evaluation_goes_on(tmp_path):
    model = tiny_model("laps")
    whole = score_split(model, loaders(), CPU, torch.no_grad, False).matrix
    killed = loaders(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        score_split(model, killed, CPU, torch.no_grad, False, RowStore(tmp_path, MADE_FROM, 6))
    again = loaders()
    found = score_split(model, again, CPU, torch.no_grad, False, RowStore(tmp_path, MADE_FROM, 6))
    assert again.images.read == [2, 2]  # the last of the two finished blocks is done once more
    np.testing.assert_array_equal(found.matrix, whole)


def test_rows_of_anything_else_are_not_taken(tmp_path):
    store = RowStore(tmp_path, MADE_FROM, 3)
    for start in (0, 2, 4):
        store.add(start, np.full((2, 3), start, np.float32))
    assert [block[0, 0] for block in RowStore(tmp_path, MADE_FROM, 3).finished()] == [0, 2]
    assert RowStore(tmp_path, {**MADE_FROM, "checkpoint": "abd"}, 3).finished() == []
    assert RowStore(tmp_path, MADE_FROM, 4).finished() == []


def test_a_gap_and_a_torn_file_end_what_is_finished(tmp_path):
    store = RowStore(tmp_path, MADE_FROM, 3)
    for start in (0, 2, 4, 6):
        store.add(start, np.zeros((2, 3), np.float32))
    torn = sorted(store.folder.glob("*.npy"))[2]
    torn.write_bytes(torn.read_bytes()[:100])
    assert len(RowStore(tmp_path, MADE_FROM, 3).finished()) == 1
    store.discard()
    assert not tmp_path.exists()


def test_rows_of_another_result_stay(tmp_path):
    unfinished = RowStore(tmp_path, MADE_FROM, 3, "f30k_test")
    stale = RowStore(tmp_path, {**MADE_FROM, "commit": "old"}, 3, "f30k_dev")
    dev = RowStore(tmp_path, MADE_FROM, 3, "f30k_dev")
    for store in (unfinished, stale, dev):
        for start in (0, 2):
            store.add(start, np.zeros((2, 3), np.float32))
    dev.discard()
    assert (dev.finished(), stale.finished()) == ([], [])
    assert len(unfinished.finished()) == 1


@pytest.fixture
def member(tmp_path):
    picture = tmp_path / "1.jpg"
    picture.write_bytes(b"pixels")
    split = Split("f30k", "test", ["a"], ["1"], [str(picture)], np.array([0]), None)
    known = ("checkpoint_sha256", "data", "commit", "versions", "method")
    gallery = Gallery("f30k", "test", ["a"], ["1"], np.array([0]))
    facts = dict.fromkeys(known, "x")
    return Member(tmp_path / "model_best.pth", None, None, gallery, facts, Namespace(), split)


def folder_of(member, *flags, device=CPU):
    return _row_store(member, parse_eval(flags), device).folder


def test_rows_depend_on_images_method_paths_arithmetic_and_device(member):
    folders = {folder_of(member), folder_of(member, "--batch_size", "3")}
    assert len(folders) == 1
    folders |= {folder_of(member, f"--{flag}", "x") for flag in ("vit_path", "bert_path")}
    folders |= {folder_of(member, "--amp", "bf16")}
    folders |= {folder_of(member, device=torch.device("cuda"))}
    folders |= {folder_of(replace(member, facts={**member.facts, "method": "laps"}))}
    assert len(folders) == 6
    Path(member.split.image_files[0]).write_bytes(b"other pixels")
    assert folder_of(member) not in folders


def test_rows_of_code_that_no_commit_tells_are_not_kept(member):
    changed = replace(member, facts={**member.facts, "commit": "abc" + CHANGES})
    assert _row_store(changed, parse_eval([]), CPU) is None


def test_where_nothing_can_be_written_it_goes_on_and_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    store = RowStore(tmp_path / "file", MADE_FROM, 3)
    assert store.finished() == []
    for start in (0, 2):
        store.add(start, np.zeros((2, 3), np.float32))
    assert capsys.readouterr().err.count("can't be kept") == 1
