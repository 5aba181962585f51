"""How each family of text backbones is called on padded word ids, and how long a text may be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.batch import length_buckets

WHOLE_LENGTH = ("siglip_text_model", "siglip2_text_model")  # trained on padding, without a mask
PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")  # count from behind padding's
WORDS_FIRST = ("bert",)  # word vectors may be handed in: one gradient of their table, not many
ENDLESS = 10**6  # for backbones that know no longest text


def text_hidden(
    backbone: nn.Module, ids: Tensor, mask: Tensor, pad_id: int, reads_padding: bool = False
) -> Tensor:
    """Return the last hidden state of word ids (B, M), (B, M, width); `mask` is True where real.

    Without `reads_padding` nobody asks what the backbone says of padding, and it may be 0.

    SigLIP's towers were trained on texts padded to all their positions and attend to the padding,
    so that is what they get here, whatever M is: a caption's features depend on no batch-mate.
    """
    if backbone.config.model_type not in WHOLE_LENGTH:
        apart = ids.is_cpu and not reads_padding
        return (_by_length if apart else _plainly)(backbone, ids, mask)
    width = ids.shape[1]
    whole = ids.masked_fill(~mask, pad_id)
    whole = pad(whole, (0, most_positions(backbone) - width), value=pad_id)  # (B, positions)
    return backbone(input_ids=whole).last_hidden_state[:, :width]


def _plainly(backbone: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def _by_length(backbone: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the same in parts of like length, so that a CPU multiplies less padding.

    What stands in the padding is 0 where a part is shorter than the batch.
    """
    lengths = mask.sum(1).tolist()
    parts = length_buckets(lengths, len(ids))
    if len(parts) < 2:
        return _plainly(backbone, ids, mask)
    name, words = "input_ids", ids
    if backbone.config.model_type in WORDS_FIRST:
        name, words = "inputs_embeds", backbone.get_input_embeddings()(ids)  # (B, M, C)
    hidden = []
    for part in parts:
        width = lengths[part[-1]]
        rows = {name: words[part, :width], "attention_mask": mask[part, :width].long()}
        states = backbone(**rows).last_hidden_state  # (b, width, C)
        hidden.append(pad(states, (0, 0, 0, ids.shape[1] - width)))
    order = torch.tensor([row for part in parts for row in part])
    return torch.cat(hidden)[order.argsort()]


def most_positions(backbone: nn.Module) -> int:
    """Return the longest text in tokens, special ones included, that the backbone can read."""
    config = backbone.config
    positions = getattr(config, "max_position_embeddings", None) or ENDLESS
    if config.model_type in PADDED_POSITIONS:
        positions -= config.pad_token_id + 1
    return positions
