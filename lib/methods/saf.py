"""SAF: a gate for each similarity vector says how much of it enters the pair's own."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.batch import Tokens
from lib.methods.pairs import Maps, computed_again
from lib.methods.registry import register_method
from lib.methods.sgraf_family import SHARED_FLAGS, SimilarityReasoning, WholeAndParts
from lib.model.reasoning import AttentionFiltration, node_mask


@register_method("saf")
class SAF(SimilarityReasoning):
    """Similarity attention filtration (SGRAF, AAAI 2021), SPEC 11.

    In training the gates' BatchNorm takes each caption's statistics over all images of the global
    batch (the sums of all ranks are added up), so all nodes are made first, in chunks, and none of
    their pairs can be scored alone. NOTE: negatives as in SGR.
    """

    scores_repeat = False
    also_reads = SHARED_FLAGS  # sgr's group has them

    def __init__(self, *args, sim_dim: int = 256, **kwargs) -> None:
        super().__init__(*args, sim_dim=sim_dim, **kwargs)
        self.reasoning = AttentionFiltration(sim_dim)

    def score(self, images: WholeAndParts, texts: WholeAndParts) -> Maps:
        """Return the similarity of a chunk of pairs; in training, of all images and captions."""
        return self._concluded(self.pair_nodes(images, texts), texts.mask)

    def pair_maps(self, images: Tokens, texts: Tokens) -> Maps:
        if not self.training:
            return super().pair_maps(images, texts)
        prepared = self.prepare_images(images), self.prepare_texts(texts)
        return self._concluded(self._all_nodes(*prepared), texts.mask)

    def loss_maps(self, images: Tokens, texts: Tokens, image_ids: Tensor) -> Maps:
        return {key: self.gather(one) for key, one in self.pair_maps(images, texts).items()}

    def _concluded(self, nodes: Tensor, word_mask: Tensor) -> Maps:
        vectors = self.reasoning(nodes, node_mask(word_mask))
        return {"similarity": self.concluded(vectors)}

    def _all_nodes(self, images: WholeAndParts, texts: WholeAndParts) -> Tensor:
        """Return the nodes of every pair, (B_v, B_t, 1 + M, S); they alone are kept for all."""
        size = self.shard_size
        again = torch.is_grad_enabled() and len(images) * len(texts) > size**2
        rows = []
        for first in range(0, len(images), size):
            part = images[first : first + size]
            starts = range(0, len(texts), size)
            columns = [self._nodes_of(part, texts[one : one + size], again) for one in starts]
            rows.append(torch.cat(columns, dim=1))
        return torch.cat(rows)

    def _nodes_of(self, images: WholeAndParts, texts: WholeAndParts, again: bool) -> Tensor:
        if again:
            return computed_again(self.pair_nodes, images, texts)
        return self.pair_nodes(images, texts)
