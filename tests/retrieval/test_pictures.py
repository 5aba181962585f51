"""Pictures of kept patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.retrieval.pictures import beside, kept_overlay, rgb_image, with_caption


def test_dropped_patches_are_dimmed_and_kept_ones_are_not():
    image = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    kept = np.array([True, False, False, True])
    drawn = kept_overlay(image, kept, (2, 2), side=64)
    assert drawn[10, 10].tolist() == [200, 100, 50]
    assert drawn[50, 50].tolist() == [200, 100, 50]
    assert drawn[10, 50].max() < 40
    with pytest.raises(ValueError, match="5 patches"):
        kept_overlay(image, np.ones(5, bool), (2, 2))


def test_a_grid_need_not_be_square():
    image = np.full((32, 48, 3), 200, np.uint8)
    drawn = kept_overlay(image, np.array([False, False, False, False, False, True]), (2, 3), 64)
    assert drawn.shape == (64, 96, 3)
    assert drawn[40, 70].tolist() == [200, 200, 200]  # the last of three columns
    assert drawn[40, 60].max() < 100


def test_normalised_pixels_come_back_as_they_were():
    pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert np.array_equal(rgb_image((pixels / 255 - mean) / std), rgb_image(pixels))


def test_captions_stand_below_and_pictures_beside_each_other():
    image = np.zeros((64, 64, 3), np.uint8)
    labelled = with_caption(image, "a rather long caption about a red star and a blue ring")
    assert labelled.shape[1] == 64
    assert labelled.shape[0] > 64
    assert (labelled[64:] < 128).any()  # letters
    strip = beside([labelled, labelled])
    assert strip.shape[0] == labelled.shape[0]
    assert strip.shape[1] > 2 * 64
