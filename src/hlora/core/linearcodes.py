"""One byte an element for numbers of either sign: a multiple of a scale for each column."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(values: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The nearest codes, int8 in −127…127, and their scale, float32.

    Args:
        values: any shape.
        dim: the dimensions that share a scale; they keep size 1 in it.
    """
    scale = (values.float().abs().amax(dim=dim, keepdim=True) / 127).clamp(min=1e-30)
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 values of the codes' shape."""
    return codes.float() * scale
