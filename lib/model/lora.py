"""Low-rank layers beside the linear layers of a backbone, by peft (an extra): `--lora_rank`."""

from __future__ import annotations

from torch import nn

from lib.errors import InputError


def add_lora(backbone: nn.Module, rank: int) -> None:
    """Give each linear layer of `backbone` a low-rank one of `rank`, which alone learns from now.

    The new layers add nothing at first (Hu et al., ICLR 2022: B = 0, scale alpha/rank = 2). Raises
    InputError where peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(
            "--lora_rank needs peft, which is not installed: pip install peft"
        ) from None
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, backbone)
