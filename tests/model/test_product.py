"""Products in C against PyTorch's in float64: sizes around every tile and block, both widths."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.model import compiled
from lib.model.product import Linear, apply_layers, matmul, multiply, with_compiled_linears

SIDES = st.integers(0, 80) | st.sampled_from([127, 200, 257, 300])


@pytest.fixture(params=["", "avx2"])
def _width(request, monkeypatch):
    monkeypatch.setenv("SEPS_NATIVE", request.param)
    if not compiled.is_available():
        pytest.skip("no C compiler here, or not for such a processor")


def matrix(rows: int, columns: int, layout: str, generator: torch.Generator) -> torch.Tensor:
    if layout == "turned":
        return torch.randn(columns, rows, generator=generator).T
    if layout == "strided":
        return torch.randn(rows, 2 * columns + 1, generator=generator)[:, 1::2]
    return torch.randn(rows, columns, generator=generator)


def assert_multiplies(left, right, out=None, add=False):
    wanted = left.double() @ right.double()
    size = left.double().abs() @ right.double().abs() + 1
    if add:
        wanted, size = wanted + out.double(), size + out.double().abs()
    found = multiply(left, right, out, add)
    assert out is None or found is out
    assert (((found - wanted) / size).abs() < 1e-6).all()


LAYOUTS = st.sampled_from(["plain", "turned", "strided"])


@pytest.mark.usefixtures("_width")
@settings(max_examples=60, deadline=None)
@given(st.tuples(SIDES, SIDES, SIDES), st.tuples(LAYOUTS, LAYOUTS), st.booleans(), st.data())
def test_agrees_with_pytorch(sides, layouts, add, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    rows, columns, depth = sides
    left = matrix(rows, depth, layouts[0], generator)
    right = matrix(depth, columns, layouts[1], generator)
    room = torch.full((rows, columns + 3), 7.0)
    assert_multiplies(left, right, room[:, :columns], add)
    assert (room[:, columns:] == 7).all()  # nothing is written beside it


@pytest.mark.usefixtures("_width")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1201, 197, 512), (197, 1201, 512), (39, 512, 98), (576, 33, 1025), (1, 1, 1)],
)
def test_agrees_at_real_sizes(rows, columns, depth, threads):
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    try:
        left = matrix(rows, depth, "plain", generator)
        right = matrix(depth, columns, "turned", generator)
        assert_multiplies(left, right)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_width")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(5, 3, 2), (2, 40, 3), (1, 3, 33)])
def test_batches_may_share_a_side(batch, rows, columns, threads):
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    try:
        left = matrix(rows, 19, "plain", generator).expand(batch, -1, -1)
        right = torch.randn(batch, columns, 19, generator=generator).transpose(1, 2)
        assert_multiplies(left, right)
        assert_multiplies(left, right, torch.ones(batch, rows, columns), add=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_width")
def test_layers_are_applied_as_they_are():
    torch.manual_seed(0)
    bare = nn.Linear(20, 5, bias=False)
    layers = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), bare)
    rows = torch.randn(9, 7, 12)
    with torch.no_grad():
        found = apply_layers(layers, rows)
        wanted = copy.deepcopy(layers).double()(rows.double())
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(apply_layers(layers.double(), rows.double()), layers(rows.double()))


@pytest.mark.parametrize("kind", ["float64", "off"])
def test_pytorch_serves_elsewhere(kind, monkeypatch):
    dtype = torch.float64 if kind == "float64" else torch.float32
    if kind == "off":
        monkeypatch.setenv("SEPS_NATIVE", "0")
    left, right = torch.randn(5, 3, dtype=dtype, requires_grad=True), torch.randn(3, 4, dtype=dtype)
    found = multiply(left, right, torch.ones(5, 4, dtype=dtype), add=True)
    torch.testing.assert_close(found, (left @ right + 1).detach())
    assert not found.requires_grad


@pytest.mark.usefixtures("_width")
def test_sizes_that_do_not_fit_are_refused_and_nan_is_handed_on():
    with pytest.raises(ValueError):
        multiply(torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(ValueError):
        multiply(torch.ones(2, 5, 3), torch.ones(1, 3, 2))
    left = torch.ones(20, 30)
    left[7, 3] = torch.nan
    found = multiply(left, torch.ones(30, 40))
    assert found[7].isnan().all()
    assert found.isnan().sum() == 40


@pytest.mark.usefixtures("_width")
@pytest.mark.parametrize("shapes", [((7, 5), (5, 9)), ((3, 7, 5), (3, 5, 9))])
def test_products_have_a_gradient_and_a_second_one(shapes):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    wide = [side.detach().double().requires_grad_() for side in sides]
    derived = []
    for operands, function in ((sides, matmul), (wide, torch.matmul)):
        first = torch.autograd.grad(function(*operands).pow(3).sum(), operands, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), operands)
        derived.append((*first, *second))
    for found, wanted in zip(*derived, strict=True):
        assert (found.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_linear_layers_of_a_network_are_compiled_and_stay_what_they_are(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Sequential(nn.Linear(7, 3, bias=False)))
    plain, rows = copy.deepcopy(network), torch.randn(4, 6, 5, requires_grad=True)
    calls, call = [], compiled.call
    monkeypatch.setattr(compiled, "call", lambda name, jobs: calls.append(name) or call(name, jobs))
    assert with_compiled_linears(network) is network
    assert isinstance(network[0], Linear)
    assert network.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(network(rows), plain(rows))
    assert bool(calls) == compiled.is_available()
    over = [rows, *network.parameters()], [rows, *plain.parameters()]
    found = torch.autograd.grad(network(rows).square().sum(), over[0])
    wanted = torch.autograd.grad(plain(rows).square().sum(), over[1])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(rows).dtype == torch.bfloat16
    assert network.double()(rows.double()).dtype == torch.float64
    assert not calls
