"""Which patches stay: the best by their scores, or a control that the scores are held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONTROLS = ("random", "inverted")


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return the bool mask of the k largest scores of each row, (…, L); of ties, the first stay."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > threshold
    tied = scores == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


class Selection(nn.Module):
    """Which patches stay, bool (…, L): the k of the largest scores.

    `control` puts something worse in their place, to see what the scores are worth: "random" draws
    k patches for each row, as `seed` says, "inverted" takes the k of the smallest scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_control(None)

    def set_control(self, control: str | None, seed: int = 0) -> None:
        """Choose by the scores (None), or by a control from now on."""
        if control not in (None, *CONTROLS):
            raise ValueError(f"unknown control {control!r}; known: {', '.join(CONTROLS)}")
        self.control = control
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, scores: Tensor, k: int) -> Tensor:
        if self.control == "random":
            drawn = torch.rand(scores.shape, generator=self._generator)
            return top_k_mask(drawn.to(scores.device), k)
        return top_k_mask(-scores if self.control == "inverted" else scores, k)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])


def control_selection(model: nn.Module, control: str | None, seed: int = 0) -> bool:
    """Set the control of every `Selection` in the model; return whether it has any."""
    found = [module for module in model.modules() if isinstance(module, Selection)]
    for one in found:
        one.set_control(control, seed)
    return bool(found)
