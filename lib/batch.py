"""What flows through the house: `Batch` (words and pixels) and `Tokens` (features)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on

FEWEST_IN_BUCKET = 16  # captions of like length that are worth a call of their own


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return the (B, width) bool mask that is True at the first `lengths[b]` positions of row b."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def image_size(img_res: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of `--img_res`: one side for a square, or both."""
    if isinstance(img_res, int):
        return img_res, img_res
    height, width = img_res
    return height, width


@dataclass
class Batch:
    """Matching image-caption pairs as the loader hands them out; row i of every field is pair i.

    At evaluation a batch holds images only or captions only, and the other fields are None.
    """

    # (B, 3, H, W) uint8, (B, N, F) float32 precomputed regions, or (B, T, F) float16 hidden states
    pixels: Tensor | None = None
    pixel_lengths: Tensor | None = None  # (B,) valid regions per image; None for pixels
    ids: Tensor | None = None  # (B, M) word ids, padded with [PAD]
    lengths: Tensor | None = None  # (B,) words per caption, [CLS] and [SEP] included
    image_ids: Tensor | None = None  # (B,) equal where two pairs share an image
    caption_index: Tensor | None = None  # (B,) line number of the caption in the split, from 0
    dense_ids: Tensor | None = None  # (B, M_d) word ids of the dense text of the pair's image
    dense_lengths: Tensor | None = None  # (B,)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = None if value is None else value.to(device, non_blocking=True)
        return Batch(**moved)

    def share_memory(self) -> Batch:
        """Move every tensor into memory that other processes can map; return the batch.

        Raises RuntimeError where it does not fit.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value.share_memory_()
        return self

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the loader's pinning thread)."""
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: None if v is None else v.pin_memory() for k, v in pinned.items()})


@dataclass
class Rows:
    """Base of dataclasses whose fields are tensors with a row an item, other Rows, or None.

    An index takes the same rows of every field. The first field is never None. `recomputed` names
    fields that follow from the others, and that may be None in what is kept for later.
    """

    recomputed: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: Any) -> Self:
        """Return the rows that a slice, a list or an index tensor names."""
        return self._map(lambda tensor: tensor[index])

    def split(self, sizes: int | list[int]) -> list[Self]:
        """Return the rows in parts of so many, as `torch.split`.

        Their gradients come together once; each slice by itself would make one of the whole.
        """
        parts = {
            name: value.split(sizes)
            for name in (field.name for field in fields(self))
            if (value := getattr(self, name)) is not None
        }
        return [
            replace(self, **dict(zip(parts, part, strict=True)))
            for part in zip(*parts.values(), strict=True)
        ]

    @property
    def device(self) -> torch.device:
        """Where the first field lies."""
        return getattr(self, fields(self)[0].name).device

    def tensors(self) -> dict[str, Any]:
        """Return the fields that are not None by name, Rows as dictionaries of the same kind."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value.tensors() if isinstance(value, Rows) else value
            for name, value in found.items()
            if value is not None
        }

    def refilled(self, tensors: dict[str, Any]) -> Self:
        """Return the same kind of rows with the values of what `tensors` returned."""
        filled = {
            name: getattr(self, name).refilled(value) if isinstance(value, dict) else value
            for name, value in tensors.items()
        }
        return replace(self, **filled)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                changed[field.name] = (
                    value._map(change) if isinstance(value, Rows) else change(value)
                )
        return replace(self, **changed)


@dataclass
class Tokens(Rows):
    """Features of B images or B captions.

    A method that pools hands out one local token an image or caption: `local` is (B, 1, C).
    """

    local: Tensor  # (B, N, C) patches, regions or words, without an image's [CLS]
    mask: Tensor  # (B, N) bool, True where the token is real
    cls: Tensor | None = None  # (B, 1, C) the image encoder's [CLS], where it has one
    dense: Tokens | None = None  # dense text that belongs to these images or captions
    fragments: Tokens | None = None  # what a method that pools made `local` of, where losses ask
    sentence: Tensor | None = None  # (B, F) of whole texts, from an encoder that is not trained

    @property
    def lengths(self) -> Tensor:
        """(B,) number of real tokens in each row."""
        return self.mask.sum(1)

    def padded(self, width: int) -> Tokens:
        """Return the tokens with `local` padded by zeros (mask False) to `width` positions."""
        extra = width - self.local.shape[1]
        if extra <= 0:
            return self
        local, mask = pad(self.local, (0, 0, 0, extra)), pad(self.mask, (0, extra))
        return replace(self, local=local, mask=mask)

    def trimmed(self) -> Tokens:
        """Return the tokens without the positions that are padding in every row."""
        width = int(self.lengths.amax()) if len(self) else 0
        if width == self.local.shape[1]:
            return self
        return replace(self, local=self.local[:, :width], mask=self.mask[:, :width])

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Return the rows of all parts in order, padded to the longest part."""
        width = max(part.local.shape[1] for part in parts)
        even = [part.padded(width) for part in parts]
        cls, dense, fragments, sentence = (
            _field(even, name) for name in ("cls", "dense", "fragments", "sentence")
        )
        return Tokens(
            local=torch.cat([part.local for part in even]),
            mask=torch.cat([part.mask for part in even]),
            cls=None if cls is None else torch.cat(cls),
            dense=None if dense is None else Tokens.cat(dense),
            fragments=None if fragments is None else Tokens.cat(fragments),
            sentence=None if sentence is None else torch.cat(sentence),
        )


def _field(parts: Sequence[Tokens], name: str) -> list[Any] | None:
    """Return a field of all parts, None where the first part has none."""
    return None if getattr(parts[0], name) is None else [getattr(part, name) for part in parts]


def length_buckets(lengths: list[int], most: int, spread: float = 1.125) -> list[list[int]]:
    """Return the indices of captions in buckets of similar lengths, shortest first, ties in order.

    A bucket holds at most `most` captions, and from `FEWEST_IN_BUCKET` on only lengths up to
    `spread` times its shortest; all together in order where lengths are equal.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    buckets: list[list[int]] = []
    for index in order:
        current = buckets[-1] if buckets else []
        longer = bool(current) and lengths[index] > spread * lengths[current[0]]
        if not current or len(current) == most or (longer and len(current) >= FEWEST_IN_BUCKET):
            buckets.append([index])
        else:
            current.append(index)
    return buckets
