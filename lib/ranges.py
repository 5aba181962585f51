"""The one table of what flags may hold, for every program, and for arguments kept in files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import InputError

MOST = 2**31 - 1  # of every whole number but a seed: what the libraries below take


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`; an open end leaves the end itself out."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    hint: str = ""

    def holds(self, value: float) -> bool:
        """Return whether a number lies in the range; NaN and infinity never do."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.hint:
            return self.hint
        if math.isfinite(self.low) and self.high < MOST:
            left, right = "(["[not self.low_open], ")]"[not self.high_open]
            return f"a number in {left}{self.low:g}, {self.high:g}{right}"
        kind = "a whole number" if math.isfinite(self.high) else "a number"
        if math.isfinite(self.low):
            return f"{kind} {'above' if self.low_open else 'of at least'} {self.low:g}"
        return "a finite number"


def _table(**groups: tuple[Range, str]) -> dict[str, Range]:
    return {flag: range_ for range_, flags in groups.values() for flag in flags.split()}


RANGES = _table(
    ones=(
        Range(1, MOST),
        "batch_size num_epochs grad_accum val_step save_step embed_size img_res shard_size"
        " tiny_width tiny_layers tiny_patch_size relevance_topk region_dim world_size avse_block"
        " recall_at topk nhead captions epochs repeats patches encoded loop_captions"
        " word_dim sim_dim num_regions sgr_step top limit max_new_tokens image_size concurrency"
        " num_tokens decoder_depth lr_update jobs shard_images"
        " loop_images image_width text_layers text_width batch scored queries",
    ),
    zeros=(
        Range(0, MOST),
        "rerank workers gpu_id val_images first_images captions_per_image feature_views"
        " lora_rank log_step skip_nonfinite max_bad_images"
        " lr_warmup_steps max_dense_word cached_batch"
        " vse_mean_warmup_epochs warmup rank local_rank retries check random examples",
    ),
    reals_from_zero=(
        Range(0),
        "global_weight weight_decay margin backbone_lr_ratio ratio_weight grad_clip"
        " score_threshold temperature",
    ),
    reals_above_zero=(
        Range(0, low_open=True),
        "learning_rate match_weight gumbel_tau decay_rate scan_lambda_t2i scan_lambda_i2t"
        " dist_timeout time_limit budget ensemble_weights",
    ),
    shares=(Range(0, 1), "attention_weight token_selection_ratio sibling_share"),
    shares_above_zero=(
        Range(0, 1, low_open=True),
        "sparse_ratio aggr_ratio avse_keep_train avse_keep_eval threshold top_p",
    ),
    shares_below_one=(
        Range(0, 1, high_open=True),
        "beta2 avse_dropout d2s_dropout gru_dropout sgraf_dropout",
    ),
    reals=(Range(), "mask_weight ratio_lambda_sparse ratio_lambda_dense"),
    switches=(
        Range(0, 1, hint="0 or 1"),
        "size_augment image_augment image_cls overwrite multi_gpu compile precomp"
        " gradient_checkpointing detach_patches save_results evaluate_cxc evaluate_eccv eval"
        " attention_kept use_cls_as_glob_embd use_token_selection use_learnable_temp memory"
        " roofline check_counts",
    ),
    seeds=(Range(0, 2**63 - 1), "seed seeds"),
    percents=(Range(0, 100, low_open=True, high_open=True), "level"),
    ports=(Range(1, 65535), "port"),
    epochs_or_none=(Range(-1, MOST), "embedding_warmup_epochs"),
    words=(Range(3, MOST, hint="a number of at least 3: [CLS], word, [SEP]"), "max_word"),
    lists=(Range(0, MOST), "lr_schedules scenes_size images"),
)
SPELT = {"gpu_id": "gpu-id"}  # flags whose name on the command line has a hyphen


def check_ranges(values: Mapping[str, Any], source: str = "") -> None:
    """Raise InputError for the first value outside its range in the table; None is never checked.

    `source` is the file that the values are from, where they are not from the command line.
    """
    for flag, value in values.items():
        allowed = RANGES.get(flag)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if allowed is None or not all(isinstance(one, (int, float)) for one in numbers):
            continue
        for number in numbers:
            if not allowed.holds(number):
                where = f"{source}: " if source else ""
                told = f"--{SPELT.get(flag, flag)} {number}"
                most = math.isfinite(number) and number > allowed.high
                fitting = f"at most {allowed.high:,}" if most and allowed.high >= MOST else allowed
                raise InputError(f"{where}{told}: give {fitting}")
