"""--dense_match sentence: texts matched by an encoder that training never touches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, softplus

from lib.batch import Tokens
from lib.errors import InputError
from lib.methods.registry import get_method
from tests.helpers import encode, pair_inputs, tiny_args, tiny_model

FLAGS = {"dense_match": "sentence", "dense_side": "none"}


def by_hand(encoder, ids, lengths) -> list[torch.Tensor]:
    """What the encoder's backbone says of each text alone: the mean of its words' states."""
    with torch.no_grad():
        return [
            encoder.sentence.backbone(input_ids=row[None, :length]).last_hidden_state[0].mean(0)
            for row, length in zip(ids, lengths.tolist(), strict=True)
        ]


def test_the_similarity_grows_by_the_weighted_cosine_of_whole_texts():
    model, inputs = tiny_model("seps", **FLAGS).eval(), pair_inputs(method="seps", **FLAGS)
    images, texts = encode(model, inputs)
    found = model.similarity(images, texts)
    dense = by_hand(model.text_encoder, inputs["dense_ids"], inputs["dense_lengths"])
    captions = by_hand(model.text_encoder, inputs["ids"], inputs["lengths"])
    term = torch.stack(
        [torch.stack([cosine_similarity(one, other, dim=0) for other in captions]) for one in dense]
    )
    weight = softplus(model.dense_match.raw_weight)
    model.dense_match = None
    expected = model.similarity(images, texts) + weight * term
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.protocol == "image"


def test_training_leaves_the_sentences_as_they_were():
    model, inputs = tiny_model("seps", **FLAGS).train(), pair_inputs(method="seps", **FLAGS)
    before = encode(model, inputs)[1].sentence
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    words = encode(model, inputs)[1].local
    model.training_losses(**inputs)["loss"].backward()
    assert model.dense_match.raw_weight.grad.abs() > 0
    assert all(one.grad is None for one in model.text_encoder.sentence.parameters())
    optimizer.step()
    images, texts = encode(model, inputs)
    assert torch.equal(texts.sentence, before)
    assert not torch.allclose(texts.local, words)
    assert images.dense.sentence.shape == texts.sentence.shape


def test_the_copy_travels_with_the_weights():
    model = tiny_model("seps", **FLAGS)
    other = tiny_model("seps", seed=1, **FLAGS)
    other.load_state_dict(model.state_dict())
    inputs = pair_inputs(method="seps", **FLAGS)
    first, second = encode(model.eval(), inputs), encode(other.eval(), inputs)
    assert torch.equal(first[1].sentence, second[1].sentence)


def test_tokens_keep_the_sentences_when_cut_and_joined():
    model, inputs = tiny_model("seps", **FLAGS).eval(), pair_inputs(method="seps", **FLAGS)
    texts = encode(model, inputs)[1]
    joined = Tokens.cat([texts[:2].trimmed(), texts[2:].trimmed()])
    assert torch.equal(joined.sentence, texts.sentence)


def test_what_knows_nothing_before_training_is_refused():
    with pytest.raises(InputError, match="--text_encoder bert"):
        tiny_model("seps", text_encoder="gru", **FLAGS)
    args = tiny_args("dense_text", dense_match="sentence")
    with pytest.raises(InputError, match=r"tools\.text_baseline"):
        get_method("dense_text").check_arguments(args)
