"""The paper's importance: one Ω_i for each element of each target matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hlora import ops
from hlora.lowrank import LowRank
from hlora.pairs import Group


class Dense:
    """Ω by layer name, (m, n) each.

    After `arrange`, the layers of a group lie in one (L, m, n) tensor.
    """

    kind = "dense"

    def __init__(self, by_name: dict[str, Tensor]) -> None:
        self._by_name = by_name
        self._stacked: dict[tuple[str, ...], Tensor] = {}

    def arrange(self, groups: Iterable[Group]) -> None:
        for group in groups:
            stacked = torch.empty(
                group.shape, dtype=self._by_name[group.names[0]].dtype, device=group.device
            )
            for row, name in zip(stacked, group.names, strict=True):
                row.copy_(self._by_name[name])
                self._by_name[name] = row  # the original is freed, one layer at a time
            self._stacked[group.names] = stacked

    def norms(self) -> dict[str, float]:
        return _per_layer(self._by_name, torch.linalg.vector_norm)

    def totals(self) -> dict[str, float]:
        return _per_layer(self._by_name, torch.sum)

    def weigh(self, group: Group, change: LowRank) -> Tensor:
        return _Weigh.apply(self._stacked[group.names], change.P, change.Q)

    def pull(self, group: Group, change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
        return ops.weigh(self._stacked[group.names], change)

    def tensors(self) -> dict[str, Tensor]:
        return self._by_name


class DenseTrace:
    """Gathers ω along the training path and consolidates it into Ω (Eq. 12, 13)."""

    def __init__(self, groups: Iterable[Group], previous: dict[str, Tensor] | None = None) -> None:
        """Start with ω = 0, and with the Ω of an earlier task if there is one."""
        self.omega: dict[tuple[str, ...], Tensor] = {}
        self.Omega: dict[tuple[str, ...], Tensor] = {}
        for group in groups:
            self.omega[group.names] = torch.zeros(
                group.shape, dtype=group.dtype, device=group.device
            )
            if previous is not None:
                self.Omega[group.names] = group.stack(previous)

    def add(self, group: Group, gradient: LowRank, step: LowRank, *, clamp: bool) -> None:
        """One optimizer step; `clamp` sets negative ω to zero after it."""
        ops.accumulate(self.omega[group.names], gradient, step)
        if clamp:
            self.omega[group.names].clamp_(min=0)

    def total(self, group: Group) -> Tensor:
        """Σ_i ω_i over the group, in float64: an estimate of the loss drop (Eq. 3)."""
        return self.omega[group.names].sum(dtype=torch.float64)

    def consolidate(self, group: Group, delta: LowRank, xi: Tensor, *, last: bool) -> Tensor:
        """Add max(ω, 0)/(Δ² + ξ) to Ω and reset ω. Returns the number of negative ω.

        Ω takes over ω's memory and ω gets new memory, unless this is the `last` time: the two
        are never one tensor.
        """
        omega = self.omega.pop(group.names)
        negative = ops.consolidate(omega, delta, xi)
        if group.names in self.Omega:
            self.Omega[group.names].add_(omega)
            if not last:
                self.omega[group.names] = omega.zero_()
        else:
            self.Omega[group.names] = omega
            if not last:
                self.omega[group.names] = torch.zeros_like(omega)
        return negative

    def importance(self) -> Dense:
        """Ω as float32, for the store."""
        return Dense(
            {
                name: row.to(torch.float32)
                for names, stacked in self.Omega.items()
                for name, row in zip(names, stacked, strict=True)
            }
        )

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the running tensors by `omega.NAME` and `Omega.NAME`."""
        return {
            f"{which}.{name}": row
            for which in ("omega", "Omega")
            for names, stacked in getattr(self, which).items()
            for name, row in zip(names, stacked, strict=True)
        }

    def load_state(self, groups: Iterable[Group], state: dict[str, Tensor]) -> None:
        for group in groups:
            for which in ("omega", "Omega"):
                if f"{which}.{group.names[0]}" in state:
                    getattr(self, which)[group.names] = group.stack(
                        {n: state[f"{which}.{n}"] for n in group.names}
                    )


def _per_layer(by_name: dict[str, Tensor], reduce: Any) -> dict[str, float]:
    """One scalar per layer, with one transfer from the device."""
    if not by_name:
        return {}
    values = torch.stack([reduce(t.float()).double() for t in by_name.values()]).tolist()
    return dict(zip(by_name, values, strict=True))


class _Weigh(torch.autograd.Function):
    """R_l with its closed-form gradients, so that autograd keeps no (m, n) matrix."""

    @staticmethod
    def forward(ctx: Any, Omega: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        values, dP, dQ = ops.weigh(Omega, LowRank(P.detach(), Q.detach()))
        ctx.save_for_backward(dP, dQ)
        return values

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor, Tensor]:
        dP, dQ = ctx.saved_tensors
        g = grad[0].reshape(-1, 1, 1)
        return None, g * dP, g * dQ
