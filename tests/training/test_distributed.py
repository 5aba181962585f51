"""Two gloo processes against one: the loss and every gradient, unequal caption lengths included."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from lib import distributed
from lib.batch import Tokens
from lib.methods.registry import method_names
from lib.training.setup import encode_in_chunks
from tests.helpers import tiny_model, untied_inputs

SHARES = [slice(0, 4), slice(4, 6)]  # ranks with different numbers of pairs


def shorten(inputs: dict) -> dict:
    """Cut the padding off, so that ranks hold captions of different widths."""
    for name in ("", "dense_"):
        if f"{name}ids" in inputs:
            longest = int(inputs[f"{name}lengths"].max())
            inputs[f"{name}ids"] = inputs[f"{name}ids"][:, :longest]
    return inputs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_share(rank: int, port: int, methods: list[tuple[str, dict]], results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.start("gloo")
    for index, (method, flags) in enumerate(methods):
        for hard in (False, True):
            model = tiny_model(method, **flags).train()
            model.set_hard_negatives(hard)
            encode_in_chunks(model, flags.get("cached_batch", 0))
            network = DistributedDataParallel(model, find_unused_parameters=model.may_leave_unused)
            inputs = untied_inputs(method=method, **flags)
            inputs["lengths"][4:] = torch.clamp(inputs["lengths"][4:], max=5)
            mine = shorten({name: value[SHARES[rank]] for name, value in inputs.items()})
            torch.manual_seed(0)
            losses = network(**mine)
            losses["loss"].backward()
            results[rank, index, hard] = (
                float(losses["loss"].detach()),
                {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None},
                {n: buffer.numpy() for n, buffer in model.named_buffers()},  # running statistics
            )
    distributed.stop()


def two_processes(methods: list[tuple[str, dict]]) -> dict:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(train_share, (free_port(), methods, results), nprocs=2)
        return dict(results)


CASES = [(name, {}) for name in method_names()] + [
    ("seps", {"dense_side": "caption", "relevance": "topk_mlp"}),
    ("seps", {"dense_side": "none", "detach_patches": 1}),
    ("seps", {"loss": "infonce"}),
    ("seps", {"loss": "trip"}),
    ("laps", {"global_weight": 0.5}),
    ("seps", {"cached_batch": 1}),
    ("laps", {"cached_batch": 3, "detach_patches": 1}),  # rank 1 has no more than that
    ("hrem", {"cached_batch": 2}),
]


@pytest.fixture(scope="module")
def shares():
    return two_processes(CASES)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{m}-{f}" for m, f in CASES])
def test_two_processes_equal_one(shares, case, hard):
    method, flags = CASES[case]
    inputs = untied_inputs(method=method, **flags)
    inputs["lengths"][4:] = torch.clamp(inputs["lengths"][4:], max=5)
    model = tiny_model(method, **flags).train()
    model.set_hard_negatives(hard)
    torch.manual_seed(0)
    losses = model.training_losses(**inputs)
    losses["loss"].backward()
    whole = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        loss, gradients, buffers = shares[rank, case, hard]
        assert loss == pytest.approx(float(losses["loss"].detach()), rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(
                torch.from_numpy(gradients[name]), gradient, atol=3e-4, rtol=1e-3, msg=name
            )
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(
                torch.from_numpy(buffers[name]), buffer, atol=1e-5, rtol=1e-4, msg=name
            )


def gather_worker(rank: int, port: int, results) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.start("gloo")
    rows = torch.full((rank + 1, 2 + rank, 3), float(rank)).requires_grad_()
    mask = torch.ones(rank + 1, 2 + rank, dtype=torch.bool)
    sentence = torch.full((rank + 1, 4), float(rank))
    gathered = distributed.gather_tokens(Tokens(rows, mask, sentence=sentence))
    assert gathered.sentence[:, 0].tolist() == [0.0, 1.0, 1.0]
    weights = torch.arange(1.0, 4.0)[:, None, None]
    (gathered.local * weights * (1 + rank)).sum().backward()
    results[rank] = (gathered.local.detach().numpy(), gathered.mask.numpy(), rows.grad.numpy())
    distributed.stop()


def test_gathered_rows_keep_order_and_gradient():
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(gather_worker, (free_port(), results), nprocs=2)
        (local, mask, first), (_, _, second) = results[0], results[1]
    assert local.shape == (3, 3, 3)
    assert local[:, 0, 0].tolist() == [0.0, 1.0, 1.0]
    assert mask.sum(1).tolist() == [2, 3, 3]
    # row r is weighted by r + 1, and both ranks' factors 1 and 2 add up
    assert first[0, 0, 0] == 3.0
    assert second[:, 0, 0].tolist() == [6.0, 9.0]
