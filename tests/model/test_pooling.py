"""Pooling against loops and the official recording; BatchNorm over ranks against one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing, nn

from lib import distributed
from lib.batch import length_mask
from lib.model.pooling import GPO, GlobalBatchNorm1d, max_k_pool
from tests.training.test_distributed import free_port

GOLDEN = Path(__file__).parents[1] / "golden" / "avse_modules.npz"


def recorded(name):
    with np.load(GOLDEN) as arrays:
        return torch.tensor(arrays[name])


def official_gpo():
    with np.load(GOLDEN) as arrays:
        state = {k: torch.tensor(v) for k, v in arrays.items() if k.startswith("gpo_state.")}
    pool = GPO()
    pool.load_state_dict({key.removeprefix("gpo_state."): value for key, value in state.items()})
    return pool


def ragged(rows, width, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, width, channels, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=generator) < 0.6  # holes, not only padding
    mask[:, 0] = True
    mask[0] = False
    mask[0, 2] = True  # one real token
    return tokens.requires_grad_(), mask


@pytest.mark.parametrize("k", [1, 2, 50])
def test_max_k_pool_is_a_loop_over_channels(k):
    tokens, mask = ragged(4, 7, 3)
    loop = torch.stack(
        [
            torch.stack(
                [row[real, c].sort(descending=True).values[:k].mean() for c in range(row.shape[1])]
            )
            for row, real in zip(tokens, mask, strict=True)
        ]
    )
    pooled = max_k_pool(tokens, mask, k)
    assert torch.allclose(pooled, loop, atol=1e-12)
    found = torch.autograd.grad(pooled.square().sum(), tokens)[0]
    assert torch.allclose(found, torch.autograd.grad(loop.square().sum(), tokens)[0], atol=1e-12)


def test_max_k_pool_of_nothing_is_zero():
    assert max_k_pool(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool), 2).tolist() == [
        [0, 0]
    ]


def test_gpo_reproduces_the_official_weights_and_embeddings():
    features, lengths = recorded("gpo_features"), recorded("gpo_lengths")
    pool = official_gpo()
    width = features.shape[1]
    assert torch.allclose(pool.weights(lengths, width), recorded("gpo_weights"), atol=1e-6)
    pooled = pool(features, length_mask(lengths, width))
    assert torch.allclose(pooled, recorded("gpo_pooled"), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8, 3), (8, 257, 512)])
def test_gpo_sums_sorted_values_and_ignores_what_is_masked(shape):
    torch.manual_seed(0)
    pool = GPO().double()
    tokens, mask = ragged(*shape)
    loop = []
    for row, real in zip(tokens, mask, strict=True):
        count = int(real.sum())
        weights = pool.weights(torch.tensor([count]), count)[0]
        loop.append(weights @ row[real].sort(dim=0, descending=True).values)
    pooled = pool(tokens, mask)
    assert torch.allclose(pooled, torch.stack(loop), atol=1e-12)
    found = torch.autograd.grad(pooled.square().sum(), tokens)[0]
    looped = torch.autograd.grad(torch.stack(loop).square().sum(), tokens)[0]
    assert torch.allclose(found, looped, atol=1e-12)
    changed = pool(tokens.masked_fill(~mask[:, :, None], 1e4), mask)
    assert torch.equal(changed, pooled)
    assert pool(tokens, mask).sum(1).isfinite().all()


def test_gpo_gradient_is_right():
    torch.manual_seed(0)
    pool = GPO(4).double()
    tokens, mask = ragged(3, 5, 2)
    assert torch.autograd.gradcheck(lambda x: pool(x, mask), (tokens,))
    pool(tokens, mask).sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in pool.parameters())


def test_gpo_runs_under_autocast():
    tokens, mask = ragged(3, 5, 4)
    pool = GPO()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool(tokens.to(torch.bfloat16), mask)
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled, pool(tokens.float(), mask), atol=0.02)


def trained_step(norm, rows):
    """One training forward and backward: output, gradients, running statistics."""
    rows = rows.clone().requires_grad_()
    out = norm(rows)
    loss = (distributed.gather_rows(out) * torch.arange(1.0, out.shape[1] + 1)).sin().sum()
    loss.backward()
    return {
        "out": out.detach(),
        "rows": rows.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "batches": norm.num_batches_tracked,
    }


def norm_and_rows(kind):
    generator = torch.Generator().manual_seed(0)
    norm = kind(4).double()
    norm.weight.data = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    rows = 3 + 2 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return norm, rows


def test_global_batch_norm_is_batch_norm_on_one_process():
    official, rows = norm_and_rows(nn.BatchNorm1d)
    ours, _ = norm_and_rows(GlobalBatchNorm1d)
    expected, found = trained_step(official, rows), trained_step(ours, rows)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ours.load_state_dict(official.state_dict())
    assert torch.equal(ours.eval()(rows), official.eval()(rows))


def _rank_step(rank, folder, port):
    torch.set_num_threads(1)
    distributed.start("gloo", f"tcp://127.0.0.1:{port}", world=2, this_rank=rank)
    norm, rows = norm_and_rows(GlobalBatchNorm1d)
    step = trained_step(norm, rows[:3] if rank == 0 else rows[3:])
    torch.save(step, f"{folder}/rank{rank}.pt")
    distributed.stop()


def test_global_batch_norm_of_two_ranks_is_that_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(_rank_step, (str(tmp_path), free_port()), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole = trained_step(*norm_and_rows(nn.BatchNorm1d))

    def close(found, expected):
        return torch.allclose(found, expected, rtol=1e-9, atol=1e-9)

    assert close(torch.cat([one["out"] for one in ranks]), whole["out"])
    # each rank holds `world` times its share, see lib.distributed
    assert close(torch.cat([one["rows"] for one in ranks]) / 2, whole["rows"])
    for key in ("weight", "bias"):
        assert close((ranks[0][key] + ranks[1][key]) / 2, whole[key])
    for one in ranks:
        assert close(one["mean"], whole["mean"])
        assert close(one["var"], whole["var"])
        assert one["batches"] == whole["batches"] == 1
