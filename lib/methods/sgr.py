"""SGR: a graph of similarity vectors, the whole pair's and each word's, reasons upon itself."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

from lib.methods.registry import register_method
from lib.methods.sgraf_family import SimilarityReasoning, WholeAndParts, add_shared_arguments
from lib.model.reasoning import GraphReasoning, node_mask


@register_method("sgr")
class SGR(SimilarityReasoning):
    """Similarity graph reasoning (SGRAF, AAAI 2021), SPEC 11.

    NOTE: in the loss the released code takes another caption of the same image for a negative; here
    it is none, as everywhere.
    """

    def __init__(self, *args, steps: int = 3, sim_dim: int = 256, **kwargs) -> None:
        super().__init__(*args, sim_dim=sim_dim, **kwargs)
        self.reasoning = GraphReasoning(sim_dim, steps)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        add_shared_arguments(group)
        group.add_argument("--sgr_step", type=int, default=3, help="steps of graph reasoning")

    @classmethod
    def settings(cls, args: argparse.Namespace) -> dict[str, Any]:
        return {**super().settings(args), "steps": args.sgr_step}

    def score(self, images: WholeAndParts, texts: WholeAndParts) -> dict[str, Tensor]:
        vectors = self.reasoning(self.pair_nodes(images, texts), node_mask(texts.mask))
        return {"similarity": self.concluded(vectors)}
