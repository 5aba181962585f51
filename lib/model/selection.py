"""Which patches stay: the best by their scores, or a control that the scores are held against."""

from __future__ import annotations

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

    `control` puts something worse in their place, to see what the scores are worth: "inverted"
    takes the k of the smallest scores; "random" takes the choice to other places, by a permutation
    of an image's patches that `seed` and the image say, the same for all captions and branches. So
    as many stay, as alike from caption to caption, but not for what is in them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_control(None)

    def set_control(self, control: str | None, seed: int = 0) -> None:
        """Choose by the scores (None), or by a control from now on."""
        if control not in (None, *CONTROLS):
            raise ValueError(f"unknown control {control!r}; known: {', '.join(CONTROLS)}")
        self.control, self.seed = control, seed

    def forward(self, scores: Tensor, k: int, own: Tensor) -> Tensor:
        """Choose by scores (B_v, T, L); `own` (B_v, L) are scores that are the image's alone."""
        if self.control == "random":
            return top_k_mask(scores, k).gather(-1, self._places(own)[:, None].expand_as(scores))
        return top_k_mask(-scores if self.control == "inverted" else scores, k)

    def _places(self, own: Tensor) -> Tensor:
        """Return a permutation of the patches of each image, (B_v, L)."""
        # rounded, so that an image is known again whatever batch it comes in
        known = (own.detach().double().sum(-1) * 100).nan_to_num().round().long().tolist()
        draw = torch.Generator()
        rows = [
            torch.randperm(
                own.shape[-1], generator=draw.manual_seed((self.seed * 1_000_003 + one) % 2**63)
            )
            for one in known
        ]
        return torch.stack(rows).to(own.device)


def control_selection(model: nn.Module, control: str | None, seed: int = 0) -> bool:
    """Set the control of every `Selection` in the model; return whether it has any."""
    found = [module for module in model.modules() if isinstance(module, Selection)]
    for one in found:
        one.set_control(control, seed)
    return bool(found)
