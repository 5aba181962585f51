"""Learnt prompt tokens that read a caption: what D2S-VSE adds to its embedding. SPEC 11."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib.model.pooling import GPO

DECODER_HEADS = 4
CROSS_HEADS = 8


def decoder_block(channels: int) -> nn.TransformerEncoderLayer:
    """Return a pre-norm Transformer block: 4 heads, exact GELU, ff = 4·C, no dropout."""
    return nn.TransformerEncoderLayer(
        channels,
        DECODER_HEADS,
        4 * channels,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


class PromptDecoder(nn.Module):
    """Word features (B, M, C), mask (B, M) -> prompt (B, C): the learnt tokens after reading them.

    The tokens stand behind the words and go with them through `depth` blocks; the prompt is their
    mean, or with `gpo` their generalised pooling. NOTE: the official module also holds a
    `mask_token`, which nothing reads.
    """

    def __init__(
        self, channels: int, num_tokens: int = 4, depth: int = 4, gpo: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_tokens, channels))
        self.blocks = nn.ModuleList(decoder_block(channels) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.pool = GPO() if gpo else None

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        count = len(self.tokens)
        states = torch.cat([words, self.tokens.expand(len(words), -1, -1).to(words.dtype)], dim=1)
        hidden = ~torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)  # (B, M + N)
        for block in self.blocks:
            states = block(states, src_key_padding_mask=hidden)
        states = self.norm(states[:, -count:])  # (B, N, C)
        if self.pool is None:
            return states.mean(1)
        return self.pool(states, mask.new_ones(states.shape[:2]))


class PromptAttention(nn.Module):
    """Word features (B, M, C), mask (B, M) -> prompt (B, C): the tokens attend to them once.

    The prompt is the mean of the tokens and of what they gather.
    """

    def __init__(self, channels: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_tokens, channels))
        self.attention = nn.MultiheadAttention(channels, CROSS_HEADS, batch_first=True)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        queries = self.tokens.expand(len(words), -1, -1).to(words.dtype)  # (B, N, C)
        gathered, _ = self.attention(
            queries, words, words, key_padding_mask=~mask, need_weights=False
        )
        return (queries + gathered).mean(1)
