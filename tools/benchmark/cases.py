"""One thing to time: a method of benchmark size, random tokens, and both ways to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib.batch import Tokens, length_mask
from lib.methods.base import Method
from lib.methods.registry import get_method
from lib.model.losses import AlignmentLoss
from lib.model.precision import DTYPES, autocast_for
from lib.model.slimming import aggregated_count, kept_count
from tools.benchmark.lengths import draw_lengths
from tools.benchmark.loop import LOOPS, PEERS

ENCODERS = {196: "ViT-224", 576: "ViT-384", 49: "Swin-224", 144: "Swin-384"}
WITHOUT_CLS = (49, 144)  # Swin
MODES = ("eval", "hardest", "sum")
SPARSE_RATIO, AGGR_RATIO = 0.5, 0.4  # the defaults of the flags
RELEASED = {"dense_owner": "caption", "detach_patches": True}  # as seps_released's flags say
CAPTIONS_PER_IMAGE = 5
BYTES = {"off": 4, "bf16": 2, "fp16": 2}


class NoEncoder(nn.Module):
    """Stands for an image encoder where tokens are given."""

    def __init__(self, num_patches: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.has_cls = num_patches not in WITHOUT_CLS


@dataclass(frozen=True)
class Case:
    """A similarity of `images` x `captions` pairs with random tokens; the seed makes them.

    `words` is a caption's length in word pieces, or None for lengths drawn from real captions.
    `mode` is eval (no gradient), hardest or sum (forward and backward of the training loss).
    """

    method: str
    mode: str
    patches: int
    words: int | None
    images: int
    captions: int
    embed_size: int = 512
    device: str = "cpu"
    amp: str = "off"
    seed: int = 0

    @property
    def encoder(self) -> str:
        return ENCODERS.get(self.patches, f"{self.patches} patches")

    @property
    def name(self) -> str:
        words = "real" if self.words is None else f"{self.words} words"
        return f"{self.method} {self.mode} {self.encoder} {words} {self.images}x{self.captions}"

    @property
    def pairs(self) -> int:
        return self.images * self.captions

    def model(self, way: str = "ours") -> Method:
        """Return the method, or where `way` is "loop" its peer, random and without encoders."""
        torch.manual_seed(self.seed)
        method = self.method if way == "ours" else PEERS[self.method]
        preset = RELEASED if method == "seps_released" else {}
        model = get_method(method)(
            NoEncoder(self.patches),
            nn.Identity(),
            AlignmentLoss(),
            embed_size=self.embed_size,
            sparse_ratio=SPARSE_RATIO,
            aggr_ratio=AGGR_RATIO,
            **preset,
        )
        model.set_hard_negatives(self.mode == "hardest")
        return model.train(self.mode != "eval").to(self.device)

    def image_tokens(self) -> Tokens:
        """Return random patches, [CLS] where the encoder has one, and for SEPS dense words."""
        lengths = torch.full((self.images,), self.patches)
        images = self._tokens(lengths, seed=3 * self.seed)
        if self.patches not in WITHOUT_CLS:
            images.cls = self._tokens(torch.ones_like(lengths), seed=3 * self.seed + 1).local
        if self.method == "seps":
            dense = torch.tensor(draw_lengths("dense", self.images, self.seed))
            images.dense = self._tokens(dense, seed=3 * self.seed + 2, trained=False)
        return images

    def text_tokens(self) -> Tokens:
        """Return random words of all captions, and for SEPS those of their images' dense texts.

        In evaluation five captions share one.
        """
        texts = self._tokens(torch.tensor(self.lengths), seed=3 * self.seed + 3)
        if self.method != "laps":
            share = CAPTIONS_PER_IMAGE if self.mode == "eval" else 1
            rows = torch.arange(self.captions) // share
            dense = torch.tensor(draw_lengths("dense", int(rows[-1]) + 1, self.seed))
            texts.dense = self._tokens(dense, seed=3 * self.seed + 2, trained=False)[rows]
        return texts

    @property
    def lengths(self) -> list[int]:
        """Length of each caption in word pieces."""
        if self.words is None:
            return draw_lengths("caption", self.captions, self.seed)
        return [self.words] * self.captions

    def _tokens(self, lengths: Tensor, seed: int, trained: bool = True) -> Tokens:
        """Return tokens in the number format that an encoder under `amp` hands out."""
        shape = (len(lengths), int(lengths.max()), self.embed_size)
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = DTYPES.get(self.amp, torch.float32)
        local = torch.randn(shape, generator=generator, device=self.device, dtype=dtype)
        mask = length_mask(lengths, shape[1]).to(self.device)
        return Tokens(local.requires_grad_(trained and self.mode != "eval"), mask)


def call_of(case: Case, way: str, model: Method, images: Tokens, texts: Tokens) -> Callable:
    """Return what is timed: `way` is "ours" or "loop"; rows of `images` match those of `texts`.

    `model` is `case.model(way)`.
    """
    autocast = autocast_for(case.amp, torch.device(case.device))
    loop = LOOPS[PEERS[case.method]]
    texts = read_texts(model, texts)

    @torch.inference_mode()
    def score() -> Tensor:
        with autocast():
            return model.similarity(images, texts) if way == "ours" else loop(model, images, texts)

    def learn() -> Tensor:
        forget_gradients(model, images, texts)
        image_ids = torch.arange(len(images), device=case.device)
        with autocast():
            if way == "ours":
                loss = model.losses(images, texts, image_ids)["loss"]
            else:
                loss = model.criterion(loop(model, images, texts), image_ids)
        loss.backward()
        return loss.detach()

    return score if case.mode == "eval" else learn


def read_texts(model: Method, texts: Tokens) -> Tokens:
    """Return the captions without the dense texts that the model would not be given."""
    return texts if model.dense_owner == "caption" else Tokens(texts.local, texts.mask)


def forget_gradients(model: Method, images: Tokens, texts: Tokens) -> None:
    """Drop the gradients of weights and tokens, as a training step does."""
    model.zero_grad(set_to_none=True)
    for tensor in (images.local, images.cls, texts.local):
        if tensor is not None:
            tensor.grad = None


def prepare_call(case: Case, way: str, captions: int) -> tuple[Callable, Callable]:
    """Return a call on 2 x 2 pairs and the case's own on `captions` captions, with one model."""
    small = replace(case, images=2, captions=2)
    model, texts = case.model(way), fewer_captions(case.text_tokens(), captions)
    return (
        call_of(small, way, model, small.image_tokens(), small.text_tokens()),
        call_of(case, way, model, case.image_tokens(), texts),
    )


def fewer_captions(texts: Tokens, count: int) -> Tokens:
    """Return `count` of the captions, evenly spread over their lengths."""
    if count >= len(texts):
        return texts
    order = texts.lengths.argsort(stable=True)
    return texts[order[torch.linspace(0, len(texts) - 1, count).round().long()]]


# --- the least work ------------------------------------------------------------------------------


def least_work(case: Case) -> tuple[float, float]:
    """Return the floating-point operations and the bytes moved of the leanest form known here.

    A pair in the direct form forms its N_c tokens of K kept patches, then their products with M
    words: 2·N_c·K·C + 2·N·C·M. In the Gram form the products of words with all L patches and of
    patches among themselves (once an image) stand for it: 2·L·C·M + N_c·K² + 2·N_c·K·M, a norm
    taking half of a symmetric matrix. Either way the patch scores cost 2·L·C. The smaller counts.
    The dense branch of SEPS, once an image, is left out. A pair that carries gradient costs three
    times as much: of B² pairs all do under the sum over negatives, 3·B under the hardest. Bytes:
    tokens read once, the matrix written once.
    """
    words = sum(case.lengths) / case.captions
    flops = pair_flops(case.patches, words, case.embed_size)
    if case.mode == "eval":
        total = flops * case.pairs
    else:
        learning = case.pairs if case.mode == "sum" else min(case.pairs, 3 * case.images)
        total = flops * (case.pairs + 2 * learning)
    features = (case.images * case.patches + case.captions * words) * case.embed_size
    passes = 1 if case.mode == "eval" else 3  # read, read again, gradient written
    return total, passes * (BYTES[case.amp] * features + 4.0 * case.pairs)


def pair_flops(patches: int, words: float, width: int) -> float:
    """Return the operations of one pair's similarity in the cheaper form; see `least_work`."""
    kept = kept_count(patches, SPARSE_RATIO)
    tokens = aggregated_count(patches, SPARSE_RATIO, AGGR_RATIO)
    every = tokens + 1 + (patches not in WITHOUT_CLS)  # the fused token, [CLS]
    direct = 2 * tokens * kept * width + 2 * every * width * words
    gram = 2 * patches * width * words + tokens * kept * (kept + 2 * words)
    return min(direct, gram) + 2 * patches * width


def loop_memory(case: Case) -> float:
    """Return about how many bytes the loop's backward pass keeps: twice what is gathered."""
    gathered = case.patches * case.embed_size * BYTES[case.amp]  # kept and dropped patches
    texts = 1 if case.method == "laps" else 2  # the released SEPS runs on the dense text too
    return 0.0 if case.mode == "eval" else 2.0 * texts * gathered * case.pairs
