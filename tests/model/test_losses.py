"""Every loss against a loop written from SPEC 6 and 10, and gradcheck away from ties."""

from __future__ import annotations

import math

import pytest
import torch

from lib.errors import InputError
from lib.methods.registry import method_names
from lib.model.losses import (
    AlignmentLoss,
    GlobalLoss,
    distance_weighted_triplet,
    distance_weights,
    hinge_triplet,
    info_nce,
    negatives_mask,
    ratio_loss,
)
from tests.helpers import encode, pair_inputs, tiny_model


@pytest.fixture
def similarity():
    generator = torch.Generator().manual_seed(4)
    return torch.rand(6, 6, generator=generator, dtype=torch.float64) * 2 - 0.5


IDS = torch.tensor([7, 3, 7, 5, 9, 1])  # pairs 0 and 2 share an image


def loop_hinge(similarity, ids, margin, hardest):
    total = 0.0
    for query in range(len(ids)):
        rows, columns = [0.0], [0.0]
        for other in range(len(ids)):
            if ids[other] != ids[query]:
                positive = float(similarity[query, query])
                rows.append(max(0.0, margin + float(similarity[query, other]) - positive))
                columns.append(max(0.0, margin + float(similarity[other, query]) - positive))
        total += max(rows) + max(columns) if hardest else sum(rows) + sum(columns)
    return total


@pytest.mark.parametrize("hardest", [False, True])
def test_hinge_equals_the_loop(similarity, hardest):
    found = hinge_triplet(similarity, negatives_mask(IDS), 0.2, hardest)
    assert float(found) == pytest.approx(loop_hinge(similarity, IDS, 0.2, hardest), abs=1e-12)


def test_pairs_of_one_image_are_never_negatives(similarity):
    similarity[0, 2] = similarity[2, 0] = 1e6
    loss = hinge_triplet(similarity, negatives_mask(IDS), 0.2)
    assert float(loss) < 1e3


def test_info_nce_equals_the_loop(similarity):
    scale, total = 3.0, 0.0
    for i in range(6):
        allowed = [j for j in range(6) if j == i or IDS[j] != IDS[i]]
        row = sum(math.exp(scale * float(similarity[i, j])) for j in allowed)
        column = sum(math.exp(scale * float(similarity[j, i])) for j in allowed)
        total += math.log(row) + math.log(column) - 2 * scale * float(similarity[i, i])
    found = info_nce(similarity, negatives_mask(IDS), torch.tensor(scale))
    assert float(found) == pytest.approx(total / 2, abs=1e-10)


def test_distance_weights_equal_the_loop():
    cosine = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.4
    ids = torch.tensor([0, 1, 2, 3, 0])
    found = distance_weights(cosine, negatives_mask(ids), cutoff=1.4)
    for i in range(5):
        log_weights = {}
        for j in range(5):
            d = max(0.5, math.sqrt(max(0.0, 2 - 2 * float(cosine[i, j]))))
            if ids[i] != ids[j] and d < 1.4:
                log_weights[j] = -(510 * math.log(d) + 509 / 2 * math.log(1 - d * d / 4))
        top = max(log_weights.values(), default=0.0)
        mass = {j: math.exp(w - top) for j, w in log_weights.items()}
        for j in range(5):
            expected = mass.get(j, 0.0) / sum(mass.values()) if mass else 0.0
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_distance_weighted_triplet_draws_only_near_negatives():
    cosine = torch.full((4, 4), -0.9)  # distance 1.95, beyond every cutoff
    cosine.fill_diagonal_(0.1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(4)
    assert float(distance_weighted_triplet(cosine, negatives_mask(ids), 0.2, 1.7, generator)) == 0
    cosine[0, 3] = 0.5  # the one near negative of image 0, and of caption 3
    loss = distance_weighted_triplet(cosine, negatives_mask(ids), 0.2, 1.7, generator)
    assert float(loss) == pytest.approx(2 * (0.2 + 0.5 - 0.1), abs=1e-6)


def test_trip_repeats_with_its_seed_and_moves_on():
    cosine = torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) * 0.5
    ids = torch.arange(8)
    first, second = AlignmentLoss("trip", seed=3), AlignmentLoss("trip", seed=3)
    values = [float(first(cosine, ids)) for _ in range(4)]
    assert values == [float(second(cosine, ids)) for _ in range(4)]
    assert len(set(values)) > 1
    resumed = AlignmentLoss("trip", seed=3)
    resumed.load_state_dict(first.state_dict())
    assert float(resumed(cosine, ids)) == float(first(cosine, ids))


def test_trip_stretches_scores_to_cosines():
    """Scores of [0, 4] choose as the cosines that they stand for; the margin stays theirs."""
    cosine = torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) * 0.5
    ids = torch.arange(8)
    plain, stretched = AlignmentLoss("trip", seed=3), AlignmentLoss("trip", seed=3)
    stretched.score_range, stretched.margin = (0.0, 4.0), 0.4
    for _ in range(4):  # twice the cosine plus 2, so twice the margin is twice the loss
        expected = 2 * float(plain(cosine, ids))
        assert float(stretched(2 * cosine + 2, ids)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", sorted(set(method_names()) - {"hrem"}))
def test_trip_is_told_the_range_of_the_scores_or_refused(method):
    if tiny_model(method).score_range is None:
        with pytest.raises(InputError, match="--loss trip"):
            tiny_model(method, loss="trip")
        return
    model = tiny_model(method, loss="trip")
    low, high = model.criterion.score_range
    assert (low, high) == model.score_range
    torch.manual_seed(0)
    with torch.no_grad():
        similarity = model.eval().similarity(*encode(model, pair_inputs(6, method)))
    assert low <= float(similarity.min()) <= float(similarity.max()) <= high


@pytest.mark.parametrize("flags", [{"relevance": "topk_mlp"}, {"dense_match": "mean"}], ids=str)
def test_trip_is_refused_where_scores_have_no_bounds(flags):
    with pytest.raises(InputError, match="--loss trip reads distances from the scores"):
        tiny_model("seps", loss="trip", **flags)


@pytest.mark.parametrize("kind", ["sum", "hardest", "infonce"])
def test_gradcheck(similarity, kind):
    wrong = negatives_mask(IDS)

    def loss(values):
        if kind == "infonce":
            return info_nce(values, wrong, torch.tensor(2.0, dtype=torch.float64))
        return hinge_triplet(values, wrong, 0.2, hardest=kind == "hardest")

    assert torch.autograd.gradcheck(loss, similarity.requires_grad_())


def test_ratio_loss_by_hand():
    sparse, dense = torch.tensor([0.4, 0.8]), torch.tensor([0.2, 0.4])
    assert float(ratio_loss(sparse, dense, 0.5, 0.5, 0.5)) == pytest.approx((0.5 - 0.45) ** 2)
    assert float(ratio_loss(sparse, None, 0.5, 0.5, 0.5)) == pytest.approx((0.5 - 0.6) ** 2)


def test_scale_multiplies(similarity):
    loss = AlignmentLoss("vse")
    whole = float(loss(similarity, IDS))
    loss.scale = 0.25
    assert float(loss(similarity, IDS)) == pytest.approx(whole / 4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_global_loss_is_of_float32_cosines_under_autocast(half):
    """In half precision other negatives would be the hardest."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(36, 64, generator=generator, requires_grad=True) for _ in range(2)]
    found = []
    for enabled in (False, True):
        criterion = GlobalLoss(1.0)
        criterion.criterion.hard_negatives = True
        with torch.autocast("cpu", half, enabled=enabled):
            loss = criterion(*sides, torch.arange(36))
        found.append([loss, *torch.autograd.grad(loss, sides)])
    for wide, mixed in zip(*found, strict=True):
        torch.testing.assert_close(mixed, wide, atol=0, rtol=0)


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="'hinge'"):
        AlignmentLoss("hinge")
