"""A killed evaluation goes on from the rows that it had finished."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.batch import Batch
from lib.retrieval.evaluation import SplitLoaders, score_split
from lib.retrieval.shards import RowStore
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
    RowStore.discard_all(tmp_path)
    assert not tmp_path.exists()


def test_where_nothing_can_be_written_it_goes_on_and_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    store = RowStore(tmp_path / "file", MADE_FROM, 3)
    assert store.finished() == []
    for start in (0, 2):
        store.add(start, np.zeros((2, 3), np.float32))
    assert capsys.readouterr().err.count("can't be kept") == 1
