"""Official checkpoints of D2S-VSE: their weights under our names, their flags under ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

METHODS = ("d2s", "d2s_released")

# Official module -> ours; the longest prefix comes first.
MODULES = {
    "img_enc.visual_encoder.": "image_encoder.backbone.",
    "img_enc.image_encoder.fc.": "image_head.",
    "img_enc.image_encoder.gpool.": "image_pool.",
    "long_txt_enc.bert.": "teacher.encoder.backbone.",
    "long_txt_enc.": "teacher.head.",
    "txt_enc.bert.": "text_encoder.backbone.",
    "txt_enc.": "text_head.",
    "prompt_learner.prompt_tokens": "prompt.tokens",
    "prompt_learner.decoder_blocks.": "prompt.blocks.",
    "prompt_learner.decoder_norm.": "prompt.norm.",
    "prompt_learner.pooling.": "prompt.pool.",
    "prompt_learner.cross_attn.": "prompt.attention.",
}
# What stands within those modules.
PARTS = (
    (r"^(text_head|teacher\.head)\.fc\.", r"\1.features.linear."),
    (r"^(text_head|teacher\.head)\.mlp\.layers\.0\.", r"\1.features.mlp.0."),
    (r"^(text_head|teacher\.head)\.mlp\.bns\.0\.", r"\1.features.mlp.1."),
    (r"^(text_head|teacher\.head)\.mlp\.layers\.1\.", r"\1.features.mlp.3."),
    (r"^(text_head|teacher\.head)\.gpool\.", r"\1.pool."),
    (r"^(text_head|teacher\.head)\.ln\.", r"\1.norm."),
    (r"^(prompt\.blocks\.\d+)\.attn\.qkv\.", r"\1.self_attn.in_proj_"),
    (r"^(prompt\.blocks\.\d+)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"^(prompt\.blocks\.\d+)\.mlp\.fc(\d)\.", r"\1.linear\2."),
)
# Parameters and statistics that the official code holds and never reads.
UNREAD = re.compile(r"(^|\.)txt_enc\.mlp\.bns\.1\.|_txt_enc\.mlp\.bns\.1\.|\.mask_token$")
CANCELLED = re.compile(r"\.features\.mlp\.0\.bias$")  # by the BatchNorm behind it


def is_d2s(state: dict[str, Any]) -> bool:
    """Return whether an official state dict is D2S-VSE's, of either stage."""
    return any("img_enc.image_encoder.gpool." in str(key) for key in state)


def translated(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the official weights under our names, but for what releases of transformers renamed.

    Left out: what nothing reads, and the bias before the BatchNorm, which goes into the running
    mean that takes it away again.
    """
    state = {_name(key): value for key, value in official.items() if not UNREAD.search(str(key))}
    for name in [name for name in state if CANCELLED.search(name)]:
        mean = name.replace("mlp.0.bias", "mlp.1.running_mean")
        if mean in state and state[mean].shape == state[name].shape:
            state[mean] = state[mean] - state.pop(name)
    return state


def _name(key: str) -> str:
    name = str(key).removeprefix("module.")
    for theirs, ours in MODULES.items():
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    for pattern, replacement in PARTS:
        name = re.sub(pattern, replacement, name)
    return name


def translated_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the file's flags with our meanings.

    There --no_res_embed is True unless it was given; --bert_path was not read.
    """
    residual = bool(flags.get("no_res_embed", True))
    return {**flags, "no_res_embed": not residual, "bert_path": "bert-base-uncased"}
