"""Texts from a model of transformers in this process: any AutoModelForImageTextToText."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lib.data.describe.outcomes import DEFAULT_MODEL, Emit, Outcome, Sampling, Task, judge
from lib.data.describe.pictures import open_resized
from lib.data.extras import need
from lib.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TransformersBackend:
    """Describes batches of images with a folder's or the hub's model.

    `device_map` (auto, or a device) spreads a large model over GPUs and needs accelerate; None
    takes the first GPU, or the CPU. Raises InputError where the model can't be loaded.
    """

    def __init__(
        self,
        model: str | None,
        sampling: Sampling,
        batch_size: int = 8,
        dtype: str = "bf16",
        device_map: str | None = None,
        seed: int = 0,
    ) -> None:
        self.name = model or DEFAULT_MODEL
        self.sampling = sampling
        self.batch_size = batch_size
        need("PIL.Image", "pillow", "--backend transformers")
        if device_map is not None:
            need("accelerate", "accelerate", "--device_map")
        self.processor, self.model = self._load(DTYPES[dtype], device_map)
        self.request = self._request()
        torch.manual_seed(seed)

    def _load(self, dtype: torch.dtype, device_map: str | None) -> tuple[Any, Any]:
        import transformers  # slow

        if int(transformers.__version__.split(".")[0]) < 5:  # processors of 4.45 read others' lists
            raise InputError(
                f"--backend transformers needs transformers 5, here is {transformers.__version__}: "
                "pip install -U transformers, or ask a server with --base_url"
            )
        kind = transformers.AutoModelForImageTextToText
        placed = {} if device_map is None else {"device_map": device_map}
        try:
            processor = transformers.AutoProcessor.from_pretrained(self.name)
            model = kind.from_pretrained(self.name, torch_dtype=dtype, **placed)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            local = "the folder" if Path(self.name).is_dir() else "the model"
            raise InputError(
                f"--model {self.name}: {local} can't be loaded as an image-text-to-text model "
                f"({told:.200}); give a local folder or a hub id that can be reached"
            ) from None
        if device_map is None:
            model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        processor.tokenizer.padding_side = "left"  # texts go on at the right
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor, model.eval()

    def _request(self) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.sampling.prompt}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"--model {self.name} has no chat template, so how to ask it is not known "
                f"({error!s:.120})"
            ) from None

    def describe(self, tasks: Iterable[Task], emit: Emit) -> None:
        """Describe the images; see Backend."""
        for batch in _batches(tasks, self.batch_size):
            images, readable = [], []
            for task in batch:
                try:
                    images.append(open_resized(task.path, self.sampling.image_size))
                    readable.append(task)
                except (OSError, ValueError) as error:
                    emit(task, Outcome(reason=f"the image can't be read ({error!s:.120})"))
            for task, outcome in zip(readable, self._outcomes(images), strict=True):
                emit(task, outcome)

    def _outcomes(self, images: Sequence[Any]) -> list[Outcome]:
        """Return an outcome an image; a batch that does not fit into memory is halved."""
        if not images:
            return []
        try:
            return self._generate(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                return [Outcome(reason="out of memory with one image", broken=True)]
            torch.cuda.empty_cache()
            half = len(images) // 2
            return self._outcomes(images[:half]) + self._outcomes(images[half:])

    @torch.inference_mode()
    def _generate(self, images: Sequence[Any]) -> list[Outcome]:
        inputs = self.processor(
            images=[[image] for image in images],
            text=[self.request] * len(images),
            return_tensors="pt",
            padding=True,
        ).to(self.model.device, self.model.dtype)
        drawn = self.sampling.temperature > 0
        how = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        ids = self.model.generate(
            **inputs,
            do_sample=drawn,
            max_new_tokens=self.sampling.max_new_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            **(how if drawn else {}),
        )  # (B, asked + new)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        pad = self.processor.tokenizer.pad_token_id
        ends = _ends_of(self.model, self.processor) | {pad}
        full = new.shape[1] >= self.sampling.max_new_tokens
        cuts = [full and int(row[-1]) not in ends for row in new]
        return [judge(text, cut) for text, cut in zip(texts, cuts, strict=True)]


def _ends_of(model: Any, processor: Any) -> set[int]:
    """Return the ids that end a text."""
    told = model.generation_config.eos_token_id
    ends = told if isinstance(told, list) else [told]
    return {one for one in [*ends, processor.tokenizer.eos_token_id] if one is not None}


def _batches(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    tasks = iter(tasks)
    while batch := list(islice(tasks, size)):
        yield batch
