"""Models whose weights or predictions are not finite, named before anything is made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlora.core.sharded import local
from hlora.errors import DivergedError


def broken_weight(model: nn.Module) -> str | None:
    """The first parameter, but for an adapter's, that is not finite; None if all are.

    By its name in the base model. Of a matrix that is held in parts, the part held here.
    """
    for name, p in model.named_parameters():
        if "lora_" not in name and not torch.isfinite(local(p)).all():
            return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return None


def check_predictions(model: nn.Module, logits: Tensor) -> None:
    """Refuse logits that no token can be drawn from.

    Raises:
        DivergedError: names the weight that is to blame, or what else may be.
    """
    if torch.isfinite(logits).all():
        return
    held = {p.dtype for p in model.parameters()}
    if torch.float16 in held:
        why = "too large for fp16: try --dtype fp32, or bf16."
    elif name := broken_weight(model):
        why = f"its {name} is not, so take another copy."
    elif torch.bfloat16 in held:
        why = "try --dtype fp32."
    else:
        why = "are its weights whole? Take another copy."
    raise DivergedError(f"The model's predictions are not finite: {why}")
