"""Matrices that several processes hold in parts (FSDP2): the whole of one, and the part held here.

Any other tensor is its own whole and its own part, so that nothing else asks which it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Its class is not imported: that takes long, and few need it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it. Every process calls this, since the parts are gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """The part held here, in the memory of the tensor itself; it may be empty."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def placed(tensor: Tensor, like: Any) -> Tensor:
    """A whole that every process has, kept in the parts that `like` is kept in. Nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def anywhere(flag: Tensor) -> Tensor:
    """Whether it is so on any process. Every process calls this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = flag.float()
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return found > 0
    return flag


def agreed(found: Tensor) -> Tensor:
    """The mean of what every process found by itself, alike but for the order in which its kernels
    added. Every process calls this: acting on their own, their weights would drift apart."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = found.clone()
        torch.distributed.all_reduce(found)
        return found / torch.distributed.get_world_size()
    return found


def anywhere_held(tensors: Iterable[Tensor], flag: bool) -> bool:
    """Whether it is so of any process's parts; where each has the whole, all know it."""
    part = next(filter(is_sharded, tensors), None)
    return flag if part is None else bool(anywhere(torch.tensor(flag, device=part.device)))
