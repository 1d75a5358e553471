"""Models whose weights or predictions are not finite, named before anything is made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlora.core.sharded import local
from hlora.errors import DivergedError


def broken_weight(model: nn.Module) -> str | None:
    """The first parameter, but for an adapter's, that is not finite; None if all are.

    Of a matrix that is held in parts, the part held here.
    """
    for name, p in model.named_parameters():
        if "lora_" not in name and not torch.isfinite(local(p)).all():
            return name
    return None


def check_predictions(model: nn.Module, logits: Tensor) -> None:
    """Refuse logits that no token can be drawn from.

    Raises:
        DivergedError: names the weight that is to blame, or what else may be.
    """
    if torch.isfinite(logits).all():
        return
    name = broken_weight(model)
    raise DivergedError(
        "The model's predictions are not finite: "
        + (f"its {name} is not, so take another copy." if name else "try --dtype fp32.")
    )
