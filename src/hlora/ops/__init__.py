"""The only place where an (m, n) matrix is formed, and then one tile of it at a time.

`reference` is plain torch and runs anywhere; `fused` is Triton, for float32 on a CUDA device.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from types import ModuleType

from torch import Tensor, float32

from hlora.logcodes import LogCodes
from hlora.lowrank import LowRank
from hlora.ops import reference
from hlora.ops.reference import add_squared_gradients, consolidate, consolidate_rank_one

__all__ = [
    "accumulate", "add_squared_gradients", "consolidate", "consolidate_rank_one", "weigh",
]  # fmt: skip


def accumulate(omega: Tensor, gradient: LowRank, step: LowRank) -> None:
    """ω ← ω − g̃ ∘ Δθ, in place (Eq. 12). See `reference.accumulate`."""
    _for(omega).accumulate(omega, gradient, step)


def weigh(
    Omega: Tensor | LogCodes, change: LowRank, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_i Ω_i D_i² of each matrix with half its gradient (Eq. 14). See `reference.weigh`."""
    return _for(change.P, left.shape[2]).weigh(Omega, change, left, right)


def _for(tensor: Tensor, rank: int = 1) -> ModuleType:
    if tensor.is_cuda and tensor.dtype == float32 and _has_fused():
        from hlora.ops import fused

        if rank <= fused.HIGHEST_RANK:
            return fused
    return reference


@lru_cache(maxsize=1)
def _has_fused() -> bool:
    """HLORA_FUSED=0 turns the kernels off."""
    return os.environ.get("HLORA_FUSED") != "0" and importlib.util.find_spec("triton") is not None
