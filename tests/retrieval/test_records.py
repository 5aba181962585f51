"""What an index keeps of an image comes back: nested, padded, as float16 and as int8."""

from __future__ import annotations

import pytest
import torch

from lib.errors import InputError
from lib.retrieval.records import flatten, joined, pack, unflatten, unpack


def tensors(rows: int = 3, words: int = 4) -> dict:
    generator = torch.Generator().manual_seed(rows)
    return {
        "patches": 5 * torch.randn(rows, 6, 8, generator=generator),
        "made": {"logits": torch.randn(rows, 2, 6, generator=generator)},
        "mask": torch.arange(words)[None] < torch.randint(1, words, (rows, 1), generator=generator),
    }


def test_names_of_rows_within_rows_come_back():
    assert unflatten(flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}})) == {
        "a": 1,
        "b": {"c": 2, "d": {"e": 3}},
    }


@pytest.mark.parametrize(("store", "error"), [("float16", 1e-3), ("int8", 0.6 / 127)])
def test_features_come_back_to_within_the_store_s_precision(store, error):
    flat = flatten(tensors())
    back = unpack(pack(flat, store, channels=8))
    assert set(back) == set(flat)
    largest = flat["patches"].abs().amax(-1, keepdim=True)
    assert ((back["patches"] - flat["patches"]).abs() <= error * largest + 1e-6).all()
    assert torch.allclose(back["made.logits"], flat["made.logits"], atol=2e-3)  # never int8
    assert torch.equal(back["mask"], flat["mask"])


def test_int8_takes_about_half_the_room():
    sizes = [pack(flatten(tensors()), store, 8).dtype.itemsize for store in ("float16", "int8")]
    assert sizes[1] < 0.75 * sizes[0]


def test_records_of_unequal_width_are_padded():
    narrow, wide = (pack(flatten(tensors(3, words)), "float16", 8) for words in (4, 7))
    whole = unpack(joined([narrow, wide]))
    assert whole["mask"].shape == (6, 7)
    assert not whole["mask"][:3, 4:].any()
    assert torch.equal(whole["patches"][:3], unpack(narrow)["patches"])


def test_what_float16_has_no_room_for_is_refused():
    with pytest.raises(InputError, match="patches"):
        pack({"patches": torch.full((1, 2, 2), 1e6)}, "float16", 2)
