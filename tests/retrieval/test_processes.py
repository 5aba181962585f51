"""Evaluation on several processes: the same numbers, empty shards too; errors raised on all."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import scoring
from arguments import parse_eval
from lib import distributed
from lib.batch import Batch
from lib.errors import InputError, NonFiniteError, WorkerError
from lib.retrieval.evaluation import SplitLoaders, evaluate_split, score_split
from lib.retrieval.similarity import shard
from tests.helpers import pair_inputs, tiny_model
from tests.training.test_distributed import free_port

IMAGES, CAPTIONS, PROCESSES = 2, 7, 3  # one process has no image
CPU = torch.device("cpu")


def loaders(fail: Exception | None = None) -> SplitLoaders:
    """This rank's share of two images with four and three captions of different lengths."""
    inputs = pair_inputs(CAPTIONS, method="seps")

    def images():
        for row in shard(IMAGES):
            one = slice(row, row + 1)
            dense = inputs["dense_ids"][one], inputs["dense_lengths"][one]
            yield Batch(pixels=inputs["pixels"][one], dense_ids=dense[0], dense_lengths=dense[1])
            if fail is not None:
                raise fail

    def captions():
        for row in shard(CAPTIONS):
            length = int(inputs["lengths"][row])
            yield Batch(ids=inputs["ids"][row : row + 1, :length], lengths=torch.tensor([length]))

    rows = np.array([0, 0, 0, 0, 1, 1, 1])
    return SplitLoaders(list(images()) if fail is None else images(), captions(), rows, IMAGES)


def a_model():
    return tiny_model("seps").eval()


def evaluate_share(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.start("gloo", seconds=120)
    model = a_model()
    matrix = score_split(model, loaders(), CPU, nullcontext, show_progress=False).matrix
    results["matrix", rank] = matrix
    results["rsum", rank] = evaluate_split(model, loaders(), CPU, nullcontext, False)["rsum"]
    for error in (InputError("a.jpg can't be decoded"), WorkerError("killed")):
        # the process with the last image alone meets it
        fail = error if rank == PROCESSES - 1 else None
        try:
            score_split(model, loaders(fail), CPU, nullcontext, show_progress=False)
        except type(error) as caught:
            results[type(error).__name__, rank] = str(caught)
    args = parse_eval(["--save_similarity", "nowhere/at/all.npy"])
    try:  # seen by rank 0, which alone writes
        scoring.evaluate_checkpoint(Path("runs/none/model_best.pth"), args, CPU)
    except InputError as caught:
        results["destination", rank] = str(caught)
    with torch.no_grad():
        for parameter in model.text_encoder.parameters():
            parameter.fill_(float("nan"))
    try:
        evaluate_split(model, loaders(), CPU, nullcontext, show_progress=False)
    except NonFiniteError as caught:
        results["NonFiniteError", rank] = str(caught)
    distributed.stop()


@pytest.fixture(scope="module")
def shares():
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(evaluate_share, (free_port(), results), nprocs=PROCESSES)
        return dict(results)


def test_rank_0_has_the_matrix_of_one_process(shares):
    whole = score_split(a_model(), loaders(), CPU, nullcontext, show_progress=False).matrix
    assert whole.shape == (IMAGES, CAPTIONS)
    np.testing.assert_allclose(shares["matrix", 0], whole, atol=1e-5)
    assert [shares["matrix", rank] for rank in (1, 2)] == [None, None]


def test_every_rank_has_the_recalls(shares):
    alone = evaluate_split(a_model(), loaders(), CPU, nullcontext, show_progress=False)["rsum"]
    assert [shares["rsum", rank] for rank in range(PROCESSES)] == pytest.approx([alone] * PROCESSES)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("InputError", "a.jpg can't be decoded"),
        ("WorkerError", "killed"),
        ("NonFiniteError", "not finite"),
        ("destination", "--save_similarity nowhere/at/all.npy"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(shares, name, told):
    for rank in range(PROCESSES):
        assert told in shares[name, rank]
