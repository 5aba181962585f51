"""Word ids -> words by a bidirectional GRU over learnt embeddings, trained from scratch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lib.batch import Tokens, length_mask
from lib.model.chunks import ChunkedEncoder

EMBEDDING_RANGE = 0.1  # embeddings start uniform within ± this


class GRUTextEncoder(ChunkedEncoder):
    """Embedding, dropout, one-layer bidirectional GRU: the word encoder of SCAN, VSE++ and SGRAF.

    ids (B, M), lengths (B,) -> Tokens(local (B, M, C)): at each word the mean of the two
    directions' states, run over the caption's own words; padding gives 0. Source: SPEC 11.
    """

    def __init__(
        self, vocab_size: int, embed_size: int, word_dim: int = 300, dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.width = embed_size
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(word_dim, embed_size, batch_first=True, bidirectional=True)
        self.proj = nn.Identity()  # the states have the joint space's width already

    def forward(self, ids: Tensor, lengths: Tensor) -> Tokens:
        words = self.in_chunks(self._states, ids, lengths)
        return Tokens(self.proj(words), length_mask(lengths, ids.shape[1]))

    def _states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        vectors = self.dropout(self.embed(ids))  # (B, M, word_dim)
        packed = pack_padded_sequence(
            vectors, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=ids.shape[1]
        )  # (B, M, 2·C)
        return states.unflatten(2, (2, self.width)).mean(2)  # (B, M, C)
