"""Named area kept, by hand; controls of the choice of patches."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lib.batch import Batch
from lib.model.choice import PatchChoice
from lib.model.selection import Selection, control_selection, top_k_mask
from lib.model.slimming import image_score
from lib.retrieval.evaluation import SplitLoaders
from lib.retrieval.kept_area import area_kept
from tests.helpers import encode, pair_inputs, tiny_model


class Listed:
    """A loader whose item i is `rows[i]`."""

    def first(self, indices):
        return Batch(ids=torch.tensor(list(indices)))


class Keeping(torch.nn.Module):
    """Keeps for caption j of image i the two patches (i + j) % 4 and the one after it."""

    def encode_image_batch(self, batch):
        return batch.ids

    encode_text_batch = encode_image_batch

    def patch_choice(self, images, texts):
        first = (images[:, None] + texts[None]) % 4
        patches = torch.arange(4)
        kept = (patches == first[..., None]) | (patches == (first[..., None] + 1) % 4)
        return PatchChoice({"sparse": kept}, {})


def test_area_by_hand(monkeypatch):
    monkeypatch.setattr("lib.retrieval.kept_area.IMAGES_AT_ONCE", 2)
    caption_images = np.array([0, 0, 1, 2])
    loaders = SplitLoaders(Listed(), Listed(), caption_images, 3)
    coverage = np.array(
        [[0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 0, 0], [0, 0, 0, 1], [0.4, 0.3, 0.2, 0.1]]
    )
    # kept: image 0 caption 0: {0, 1}; 0, 1: {1, 2}; 1, 2: {3, 0}; 2, 3: {1, 2}
    coverages = {"named_area": coverage, "attention_kept": coverage[:, ::-1]}
    both = area_kept(Keeping(), loaders, coverages, torch.device("cpu"), nullcontext)
    found = both["named_area"]
    assert found["kept"] == pytest.approx((0.8 + 0.5 + 1.0 + 0.5) / 4)
    assert found["random"] == 0.5
    assert found["best"] == pytest.approx((0.8 + 1.0 + 1.0 + 0.7) / 4)
    turned = both["attention_kept"]
    assert turned["kept"] == pytest.approx((0.2 + 0.5 + 1.0 + 0.5) / 4)
    assert turned["best"] == pytest.approx(found["best"])


def kept(model, images, texts):
    return model.patch_choice(images, texts).kept["sparse"]


def test_controls_choose_as_many_patches():
    scores, own, choice = torch.randn(3, 5, 16), torch.randn(3, 16), Selection()
    learned = choice(scores, 4, own)
    assert torch.equal(learned, top_k_mask(scores, 4))
    choice.set_control("inverted")
    assert torch.equal(choice(scores, 4, own), top_k_mask(-scores, 4))
    choice.set_control("random", seed=1)
    drawn = choice(scores, 4, own)
    assert (drawn.sum(-1) == 4).all()
    assert not torch.equal(drawn, learned)
    choice.set_control("random", seed=2)
    assert not torch.equal(drawn, choice(scores, 4, own))
    with pytest.raises(ValueError, match="known: random, inverted"):
        choice.set_control("best")


def test_random_patches_overlap_as_the_chosen_ones_do_and_are_the_images_own():
    scores, own, choice = torch.randn(40, 5, 64), torch.randn(40, 64), Selection()
    learned = choice(scores, 16, own)
    choice.set_control("random", seed=1)
    drawn = choice(scores, 16, own)
    for one in range(5):  # of two captions, or a caption and the dense text
        common = (learned[:, 0] & learned[:, one]).sum(-1)
        assert torch.equal((drawn[:, 0] & drawn[:, one]).sum(-1), common)
    # whatever comes beside an image, and whatever noise its scores have
    assert torch.equal(choice(scores[7:9], 16, own[7:9] + 1e-7), drawn[7:9])
    hit = (drawn & learned).sum(-1).double().mean()
    assert hit == pytest.approx(16 * 16 / 64, abs=0.5)
    places = drawn[:, 0].double().mean(0)  # no place is chosen for all images
    assert places.max() < 0.6


@pytest.mark.parametrize("method", ["laps", "seps", "ilaps", "seps_released"])
def test_a_control_reaches_scores_and_kept_patches(method):
    model = tiny_model(method).eval()
    images, texts = encode(model, pair_inputs(4, method))
    with torch.no_grad():
        learned = model.similarity(images, texts), kept(model, images, texts)
        assert control_selection(model, "inverted")
        control = model.similarity(images, texts), kept(model, images, texts)
        assert not torch.allclose(learned[0], control[0])
        assert (learned[1] & control[1]).sum() < learned[1].sum()
        control_selection(model, None)
        assert torch.equal(model.similarity(images, texts), learned[0])


def test_methods_that_keep_all_patches_have_no_control():
    assert not control_selection(tiny_model("scan"), "random")


def test_image_scores():
    """A patch unlike the rest has the least of `mean` and the most of `distinct`."""
    patches = torch.ones(1, 6, 8) + 0.01 * torch.randn(1, 6, 8)
    patches[0, 2] = -1
    mask = torch.ones(1, 6, dtype=torch.bool)
    mean, distinct = (image_score(patches, mask, kind) for kind in ("mean", "distinct"))
    assert int(mean.argmin()) == int(distinct.argmax()) == 2
    assert float(mean.min()) == 0
    assert float(distinct.max()) == 1
    torch.testing.assert_close(mean + distinct, torch.ones(1, 6))
    assert not image_score(patches.bfloat16(), mask, "none").any()
    assert image_score(patches.bfloat16(), mask, "none").dtype == torch.float32
