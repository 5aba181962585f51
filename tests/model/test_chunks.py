"""The base of encoders that take a batch in chunks, on a module small enough to follow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.model.chunks import ChunkedEncoder


class TwoBiases(ChunkedEncoder):
    """Two weights that autograd gives one tensor for a gradient of a single row; one unread."""

    def __init__(self, rows_at_once: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(1, 4))
        self.unread = nn.Parameter(torch.zeros(1, 4))
        self.rows_at_once = rows_at_once

    def forward(self, rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return self.in_chunks(
            lambda rows, factors: rows * factors[:, None] + self.first + self.second, rows, factors
        )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_give_the_features_and_the_gradient_of_the_whole(size):
    rows, factors = torch.arange(20.0).view(5, 4), torch.arange(1.0, 6)
    module, weights = TwoBiases(size), torch.arange(20.0).view(5, 4) + 1
    features = module(rows, factors)
    assert torch.equal(features, rows * factors[:, None])
    (features * weights).sum().backward(retain_graph=True)
    for parameter in (module.first, module.second):
        assert torch.equal(parameter.grad, weights.sum(0, keepdim=True))
    assert module.unread.grad is None
    (features * weights).sum().backward()
    assert torch.equal(module.first.grad, 2 * weights.sum(0, keepdim=True))


def test_without_a_gradient_to_find_no_graph_is_kept():
    rows, factors = torch.ones(5, 4), torch.ones(5)
    module = TwoBiases(2)
    with torch.no_grad():
        assert not module(rows, factors).requires_grad
    assert not module.requires_grad_(False)(rows, factors).requires_grad


def test_a_weight_changed_before_the_backward_pass_is_an_error():
    module = TwoBiases(2)
    loss = module(torch.ones(5, 4), torch.ones(5)).sum()
    with torch.no_grad():
        module.first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
