"""The paper's importance: one Ω_i for each element of each target matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hlora.core import ops
from hlora.core.importance import Importance, Shapes, Trace
from hlora.core.logcodes import LogCodes
from hlora.core.lowrank import LowRank, Weighed
from hlora.core.pairs import Group, unstack

SCALE = ".scale"
STORAGES = ("fp32", "bf16", "int8")


class Dense(Importance):
    """Ω by layer name, (m, n) each, as float32, bfloat16 or 8-bit codes.

    After `arrange`, the layers of a group lie in one (L, m, n) tensor of the same type.
    """

    kind = "dense"
    storages = STORAGES
    conversions = (*STORAGES, "factored")

    def __init__(self, by_name: Mapping[str, Tensor | LogCodes]) -> None:
        self._by_name = dict(by_name)
        self._stacked: dict[tuple[str, ...], Tensor | LogCodes] = {}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Dense:
        """Raises ValueError for codes without their scale, or the reverse."""
        by_name: dict[str, Tensor | LogCodes] = {}
        for name, tensor in tensors.items():
            if name.endswith(SCALE):
                if name.removesuffix(SCALE) not in tensors:
                    raise ValueError(f"{name} has no codes")
            elif tensor.dtype == torch.uint8:
                if name + SCALE not in tensors:
                    raise ValueError(f"{name} has no scale")
                by_name[name] = LogCodes(tensor, tensors[name + SCALE])
            else:
                by_name[name] = tensor
        return cls(by_name)

    @classmethod
    def trace(cls, groups: list[Group], earlier: Importance | None) -> DenseTrace:
        return DenseTrace(groups, earlier)

    def check(self) -> None:
        for name, t in self._by_name.items():
            codes = isinstance(t, LogCodes)
            values = t.scale if isinstance(t, LogCodes) else t  # a code cannot be negative
            if not torch.isfinite(values).all() or (not codes and (values < 0).any()):
                raise ValueError(f"the importance of {name} is negative or not finite")

    @classmethod
    def bytes(cls, shapes: Shapes, storage: str = "fp32", sequences: int = 0) -> int:
        each = {"fp32": 4, "bf16": 2, "int8": 1}[storage]
        scales = 8 if storage == "int8" else 0
        return sum(m * (each * n + scales) for m, n, _ in shapes)

    @property
    def names(self) -> set[str]:
        return set(self._by_name)

    def stored_as(self, storage: str) -> Dense:
        """The same in another format: fp32, bf16 or int8 (logarithmic codes)."""
        return type(self)({n: _converted(t, storage) for n, t in self._by_name.items()})

    def converted(self, to: str) -> Importance:
        if to == "factored":
            from hlora.core.importance.factored import Factored

            return Factored.of_dense(self.decoded())
        return self.stored_as(to) if to in self.storages else super().converted(to)

    def decoded(self) -> dict[str, Tensor]:
        """Ω by layer name as float32."""
        return {n: t.to(torch.float32) for n, t in self._by_name.items()}

    def arrange(self, groups: Iterable[Group]) -> None:
        for group in groups:
            first: Any = self._by_name[group.names[0]]
            if isinstance(first, LogCodes):
                stacked: Any = LogCodes.empty(group.shape, group.device)
            else:
                stacked = torch.empty(group.shape, dtype=first.dtype, device=group.device)
            for l, name in enumerate(group.names):
                stacked[l].copy_(self._by_name[name])
                self._by_name[name] = stacked[l]  # the original is freed, one layer at a time
            self._stacked[group.names] = stacked

    def norms(self) -> dict[str, float]:
        return _per_layer(self._by_name, torch.linalg.vector_norm)

    def totals(self) -> dict[str, float]:
        return _per_layer(self._by_name, torch.sum)

    def pull(self, group: Group, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
        return ops.weigh(self._stacked[group.names], change, left, right)

    def tensors(self) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, t in self._by_name.items():
            if isinstance(t, LogCodes):
                result |= {name: t.codes, name + SCALE: t.scale}
            else:
                result[name] = t
        return result


class DenseTrace(Trace):
    """ω and Ω as (L, m, n). At the consolidation Ω takes over ω's memory."""

    def __init__(self, groups: Iterable[Group], earlier: Importance | None = None) -> None:
        super().__init__()
        for group in groups:
            omega = torch.zeros(group.shape, dtype=group.dtype, device=group.device)
            self.omega[group.names] = (omega,)
            if isinstance(earlier, Dense):
                self.Omega[group.names] = (group.stack(earlier.decoded()),)

    def add(self, group: Group, gradient: LowRank, step: LowRank, *, clamp: bool) -> None:
        (omega,) = self.omega[group.names]
        ops.accumulate(omega, gradient, step)
        if clamp:
            omega.clamp_(min=0)

    def consolidate(self, group: Group, delta: LowRank, xi: Tensor, *, last: bool) -> Tensor:
        (omega,) = self.omega.pop(group.names)
        negative = ops.consolidate(omega, delta, xi)
        if group.names in self.Omega:
            self.Omega[group.names][0].add_(omega)
            if not last:
                self.omega[group.names] = (omega.zero_(),)
        else:
            self.Omega[group.names] = (omega,)
            if not last:  # memory of its own: the two are never one tensor
                self.omega[group.names] = (torch.zeros_like(omega),)
        return negative

    def importance(self) -> Dense:
        rows: dict[str, Tensor] = {}
        for names, (stacked,) in self.Omega.items():
            rows |= unstack(names, [stacked.to(torch.float32)])
        return Dense(rows)


def _converted(values: Tensor | LogCodes, storage: str) -> Tensor | LogCodes:
    if isinstance(values, LogCodes) and storage == "int8":
        return values
    values = values.to(torch.float32)
    if storage == "int8":
        return LogCodes.encode(values)
    return values.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage])


def _per_layer(by_name: Mapping[str, Tensor | LogCodes], reduce: Any) -> dict[str, float]:
    """One scalar per layer, with one transfer from the device."""
    values = torch.stack([reduce(t.to(torch.float32)).double() for t in by_name.values()]).tolist()
    return dict(zip(by_name, values, strict=True))
