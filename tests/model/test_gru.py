"""The GRU word encoder: its own words and nothing behind them, gradient, other methods."""

from __future__ import annotations

import torch

from lib.model.gru import GRUTextEncoder
from tests.helpers import encode, pair_inputs, tiny_model


def encoder(**flags) -> GRUTextEncoder:
    torch.manual_seed(0)
    return GRUTextEncoder(30, 8, word_dim=5, **{"dropout": 0.0, **flags}).double()


def test_words_are_those_of_a_caption_by_itself():
    ids = torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([3, 7, 1, 5])  # in no order
    words = encoder()(ids, lengths)
    assert torch.equal(words.lengths, lengths)
    for row, length in enumerate(lengths.tolist()):
        states, _ = encoder().gru(encoder().embed(ids[row : row + 1, :length]))
        expected = (states[0, :, :8] + states[0, :, 8:]) / 2
        torch.testing.assert_close(words.local[row, :length], expected, atol=1e-12, rtol=0)
        assert not words.local[row, length:].any()


def test_dropout_is_of_the_embeddings_in_training_alone():
    ids, lengths = torch.arange(12).view(2, 6), torch.tensor([6, 6])
    model = encoder(dropout=0.5)
    assert not torch.equal(model(ids, lengths).local, model(ids, lengths).local)
    model.eval()
    assert torch.equal(model(ids, lengths).local, model(ids, lengths).local)


def test_embeddings_start_within_a_tenth():
    weights = encoder().embed.weight
    assert float(weights.abs().max().detach()) <= 0.1
    assert float(weights.std().detach()) > 0.04


def test_other_methods_read_captions_with_it():
    for method in ("vse", "scan", "chan", "hrem"):
        inputs = pair_inputs(method=method)
        model = tiny_model(method, text_encoder="gru", word_dim=6)
        assert isinstance(model.text_encoder, GRUTextEncoder)
        model.training_losses(**inputs)["loss"].backward()
        assert all(bool(one.grad.abs().sum() > 0) for one in model.text_encoder.parameters())
        similarity = model.eval().similarity(*encode(model, inputs))
        assert torch.isfinite(similarity).all()
