"""The only place where an (m, n) matrix is formed, and then one tile of it at a time.

`reference` is plain torch and runs anywhere; `fused` is Triton, for float32 on a CUDA device.
"""

from __future__ import annotations

import logging
import os
import subprocess
from typing import Any

import torch
from torch import Tensor, float32

from hlora.core.logcodes import LogCodes
from hlora.core.lowrank import LowRank, Weighed
from hlora.core.ops import reference
from hlora.core.ops.reference import add_squared_gradients, consolidate, consolidate_rank_one

__all__ = [
    "accumulate", "add_squared_gradients", "consolidate", "consolidate_rank_one", "weigh",
]  # fmt: skip

logger = logging.getLogger(__name__)


def accumulate(omega: Tensor, gradient: LowRank, step: LowRank) -> None:
    """ω ← ω − g̃ ∘ Δθ, in place (Eq. 12). See `reference.accumulate`."""
    _run("accumulate", 1, omega, gradient, step)


def weigh(Omega: Tensor | LogCodes, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
    """The change weighed by Ω (Eq. 14). See `reference.weigh`."""
    return _run("weigh", left.shape[2], Omega, change, left, right)


def _run(name: str, rank: int, Omega: Any, change: LowRank, *others: Any) -> Any:
    """The kernel where it can be, and plain torch where Triton turns out not to work."""
    args = (Omega, change, *others)
    chosen = not _given_up and os.environ.get("HLORA_FUSED") != "0"
    if chosen and _fits(change.P, rank):
        from hlora.core.ops import fused

        try:
            with torch.cuda.device_of(change.P):  # Triton launches on the current device
                return getattr(fused, name)(*args)
        except Exception as error:
            if not _cannot_compile(error):
                raise
            _give_up(error)
    return getattr(reference, name)(*args)


def _fits(tensor: Tensor, rank: int = 1) -> bool:
    return tensor.is_cuda and tensor.dtype == float32 and rank <= HIGHEST_RANK


HIGHEST_RANK = 128
"""Of the kernels: beyond, the sums of a tile no longer fit a GPU's registers."""

_given_up = False


def _cannot_compile(error: Exception) -> bool:
    """Whether Triton is what fails: an import, a compiler that is missing, a GPU that it lacks."""
    if isinstance(error, (ImportError, subprocess.CalledProcessError, FileNotFoundError)):
        return True
    if "Failed to find C compiler" in str(error):
        return True
    return type(error).__module__.startswith("triton.")


def _give_up(error: Exception) -> None:
    global _given_up
    _given_up = True
    logger.warning(
        "Triton's kernels do not work here, so slower plain torch does their work. Set "
        "HLORA_FUSED=0 to choose it yourself. The reason: %s: %s",
        type(error).__name__, str(error).strip().split("\n")[-1],
    )  # fmt: skip
