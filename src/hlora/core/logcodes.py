"""One byte an element: the logarithm, with a scale for each row.

Importance spans many powers of ten, so linear 8-bit codes turn most of a heavy-tailed Ω into
zeros. A logarithm keeps every element within a fixed share of its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OCTAVES = 24.0
"""Elements below 2^-24 of their row's largest are kept as if they were that large."""


@dataclass(frozen=True)
class LogCodes:
    """Non-negative numbers as codes; code 0 is an exact zero, code c > 0 is 2^(low + (c−1) step).

    Args:
        codes: (..., m, n) uint8.
        scale: (..., m, 2) float32, low and step of each row.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def encode(cls, values: Tensor) -> LogCodes:
        """The nearest codes of non-negative values (..., m, n)."""
        logs = values.float().log2()
        largest = logs.amax(dim=-1, keepdim=True)
        least = torch.where(values > 0, logs, torch.inf).amin(dim=-1, keepdim=True)
        empty = ~largest.isfinite()
        low = torch.where(empty, 0.0, torch.maximum(least, largest - OCTAVES))
        step = torch.where(empty, 1.0, ((largest - low) / 254).clamp(min=2.0**-20))
        codes = ((logs - low) / step).round().clamp(0, 254) + 1
        codes = torch.where(values > 0, codes, 0.0)
        return cls(codes.to(torch.uint8), torch.cat([low, step], dim=-1))

    @classmethod
    def empty(cls, shape: tuple[int, int, int], device: torch.device) -> LogCodes:
        """For `copy_`: the values (L, m, n) are not set."""
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        return cls(codes, torch.empty((*shape[:2], 2), dtype=torch.float32, device=device))

    def copy_(self, other: LogCodes) -> None:
        self.codes.copy_(other.codes)
        self.scale.copy_(other.scale)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values (..., m, n)."""
        low, step = self.scale[..., :1], self.scale[..., 1:]
        codes = self.codes.float()
        values = torch.addcmul(low - step, codes, step).exp2_()
        # In place: on a CPU each pass over a tile counts.
        return values.mul_(codes.clamp_(max=1)).to(dtype)

    def __getitem__(self, index: Any) -> LogCodes:
        """A part of the matrices or rows."""
        return LogCodes(self.codes[index], self.scale[index])
