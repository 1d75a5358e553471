"""Evaluation mode for a while: without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_PACKS = "Linear4bit"
"""In evaluation on a CPU bitsandbytes packs its weights, and then nothing trains below them."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's former mode after."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    for module, _ in before:
        if type(module).__name__ == _PACKS:
            module.training = True
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
