"""What an image encoder was trained to see: mean, standard deviation, filter of the resize."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PUBLISHED = {  # of the families' checkpoints, where a folder holds no preprocessor_config.json
    "beit": (HALF, HALF),
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": (HALF, HALF),
    "siglip2_vision_model": (HALF, HALF),
}
OFFICIAL = ("vit", "swin")  # the LAPS family's encoders, which its code feeds ImageNet's numbers
BILINEAR = 2  # PIL's number; every other filter is taken for bicubic


@dataclass(frozen=True)
class Preprocessing:
    """Mean and standard deviation of RGB in [0, 1], and the filter that images are resized with.

    Every image is squashed to the encoder's size, whole, as the LAPS family does: an encoder's own
    centre crop would hide what a caption may speak of.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample: str = "bicubic"

    def plain(self) -> dict[str, Any]:
        """Return what `from_plain` reads, JSON-able."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Preprocessing:
        """Return what `plain` wrote."""
        return Preprocessing(tuple(values["mean"]), tuple(values["std"]), values["resample"])


def choose_preprocessing(
    image_norm: str | None, config: PretrainedConfig, source: str | None
) -> Preprocessing:
    """Return the preprocessing of `--image_norm`: "imagenet", "model", or None for the default.

    The default is ImageNet's for ViT and Swin, as in the official code, and for others their own
    preprocessor_config.json (in the folder or of the hub id `source`), or where that is missing
    what their family's published checkpoints have. Raises InputError where "model" was asked for
    and there is no such file.
    """
    if image_norm == "imagenet" or (image_norm is None and config.model_type in OFFICIAL):
        return Preprocessing()
    found = None if source is None else _own(source)
    if found is None and image_norm == "model":
        raise InputError(
            f"--image_norm model: {source or 'an untrained encoder'} has no "
            "preprocessor_config.json; add the file, or give --image_norm imagenet"
        )
    return found or Preprocessing(*PUBLISHED.get(config.model_type, (IMAGENET_MEAN, IMAGENET_STD)))


def _own(source: str) -> Preprocessing | None:
    from transformers.image_processing_utils import BaseImageProcessor  # slow to import

    try:
        values, _ = BaseImageProcessor.get_image_processor_dict(source)
    except (OSError, ValueError):
        return None
    mean, std = values.get("image_mean"), values.get("image_std")
    if not values.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        return None
    resample = "bilinear" if values.get("resample") == BILINEAR else "bicubic"
    return Preprocessing(tuple(mean), tuple(std), resample)
