"""Importance as rows × columns: Ω_ij ≈ u_i v_j, from the thin matrices alone.

No (m, n) memory in either phase, and m + n numbers a matrix on disk. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hlora.core import ops
from hlora.core.importance import Importance, Shapes, Trace
from hlora.core.lowrank import LowRank, Weighed
from hlora.core.pairs import Group
from hlora.core.presets import RecordRule
from hlora.errors import InputError

ROWS, COLUMNS = ".rows", ".columns"


class Factored(Importance):
    """Row sums and column sums of Ω by layer name, (m,) and (n,).

    With T their common total, Ω_ij ≈ rows_i columns_j / T: the one rank-one matrix that has them.
    """

    kind = "factored"
    conversions = ("factored",)

    def __init__(self, by_name: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._by_name = by_name
        self._stacked: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Factored:
        names = [k.removesuffix(ROWS) for k in tensors if k.endswith(ROWS)]
        if len(tensors) != 2 * len(names):
            raise ValueError("rows or columns are missing")
        return cls({n: (tensors[n + ROWS], tensors[n + COLUMNS]) for n in names})

    @classmethod
    def of_dense(cls, by_name: dict[str, Tensor]) -> Factored:
        """The marginals of a dense Ω."""
        return cls({n: (t.float().sum(1), t.float().sum(0)) for n, t in by_name.items()})

    @classmethod
    def ones(cls, shapes: Mapping[str, tuple[int, int]]) -> Factored:
        """Ω = 1 for shapes (m, n) by layer name: the penalty is then plain L2 to the anchor."""
        return cls(
            {
                name: (torch.full((m,), float(n)), torch.full((n,), float(m)))
                for name, (m, n) in shapes.items()
            }
        )

    @classmethod
    def check_settings(cls, rule: RecordRule, storage: str) -> None:
        super().check_settings(rule, storage)
        if rule.clamp == "step":
            raise InputError(
                "Factored importance knows only sums of ω, so it cannot clamp each element after "
                "each step (preset 'official'): record with kind='dense'."
            )

    @classmethod
    def trace(cls, groups: list[Group], earlier: Importance | None) -> FactoredTrace:
        return FactoredTrace(groups, earlier)

    def check(self) -> None:
        for name, both in self._by_name.items():
            if not all(torch.isfinite(t).all() and (t >= 0).all() for t in both):
                raise ValueError(f"the importance of {name} is negative or not finite")

    @classmethod
    def bytes(cls, shapes: Shapes, storage: str = "fp32", sequences: int = 0) -> int:
        return sum(4 * (m + n) for m, n in shapes)

    def converted(self, to: str) -> Importance:
        if to == "factored":
            return self
        if to not in ("fp32", "bf16", "int8"):
            return super().converted(to)
        raise InputError(
            "Factored importance holds sums only, so no dense one can be made from it: record "
            "with --kind dense."
        )

    @property
    def names(self) -> set[str]:
        return set(self._by_name)

    def arrange(self, groups: Iterable[Group]) -> None:
        for group in groups:
            rows, columns = group.stack_both(self._by_name)
            # Each factor takes the root of the total, so that neither overflows in float32.
            root = rows.sum(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
            self._stacked[group.names] = (rows / root, columns / root)

    def norms(self) -> dict[str, float]:
        """‖u vᵀ‖₂ = ‖u‖ ‖v‖."""
        return {
            n: float(torch.linalg.vector_norm(r.double()) * torch.linalg.vector_norm(c.double()))
            / max(float(r.double().sum()), 1e-300)
            for n, (r, c) in self._by_name.items()
        }

    def totals(self) -> dict[str, float]:
        return {n: float(r.double().sum()) for n, (r, _) in self._by_name.items()}

    def pull(self, group: Group, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
        return change.weigh_rank_one(*self._stacked[group.names], left, right)

    def tensors(self) -> dict[str, Tensor]:
        return {
            name + suffix: t
            for name, both in self._by_name.items()
            for suffix, t in zip((ROWS, COLUMNS), both, strict=True)
        }


class FactoredTrace(Trace):
    """Row sums (L, m) and column sums (L, n) of ω and Ω.

    The sums of ω are exact. At the consolidation ω itself is taken for the rank-one matrix that
    has them; Ω = ω/(Δ² + ξ) is then formed tile by tile and only its sums are kept. Those of
    several general tasks add up.
    """

    parts = (ROWS, COLUMNS)

    def __init__(self, groups: Iterable[Group], earlier: Importance | None = None) -> None:
        super().__init__()
        for group in groups:
            self.omega[group.names] = _zeros(group)
            if isinstance(earlier, Factored):
                self.Omega[group.names] = group.stack_both(earlier._by_name)

    def add(self, group: Group, gradient: LowRank, step: LowRank, *, clamp: bool) -> None:
        if clamp:
            raise ValueError("only sums of ω are known: no element can be clamped")
        for sums, of_step in zip(self.omega[group.names], gradient.marginals(step), strict=True):
            sums -= of_step

    def consolidate(self, group: Group, delta: LowRank, xi: Tensor, *, last: bool) -> Tensor:
        """Rows and columns whose sum is negative count as zero; the rows' elements are returned."""
        rows, columns = self.omega[group.names]
        negative = (rows < 0).sum() * group.n
        sums = ops.consolidate_rank_one(rows.clamp(min=0), columns.clamp(min=0), delta, xi)
        before = self.Omega.get(group.names, _zeros(group))
        self.Omega[group.names] = (before[0] + sums[0], before[1] + sums[1])
        self.omega[group.names] = _zeros(group)
        return negative

    def importance(self) -> Factored:
        return Factored(
            {
                name: (rows.float(), columns.float())
                for names, both in self.Omega.items()
                for name, rows, columns in zip(names, *both, strict=True)
            }
        )


def _zeros(group: Group) -> tuple[Tensor, Tensor]:
    like = group.s.new_zeros
    return like(len(group.names), group.m), like(len(group.names), group.n)
