"""Importance of the entries of A and B themselves, not of the weights s·B A that they make.

SI along a general phase (Zenke et al. 2017, here on LoRA's factors), and the diagonal Fisher
information (LaLoRA, Sliwa et al. 2025). The penalty Σ Ω_B (B − B^ν)² + Σ Ω_A (A − A^ν)² is not a
function of θ: factors that make the same θ cost differently, so training must start at the very
factors that were looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hlora.core.importance import Importance, Shapes, Trace
from hlora.core.importance.fisher import LEAN
from hlora.core.importance.passes import backward_passes
from hlora.core.lowrank import LowRank, Weighed
from hlora.core.pairs import Group, Pair, group, unstack
from hlora.core.presets import RecordRule
from hlora.errors import InputError, MismatchError

PARTS = (".B", ".A")


def _apart(product: LowRank, r: int) -> tuple[Tensor, Tensor]:
    """B's part (L, m, r) and A's (L, r, n) of what `LowRank.moved` (the former times s) or the
    estimator `equivalent` made."""
    return product.P[:, :, :r], product.Q[:, r:]


class Entries(Importance):
    """Ω by layer name, (m, r) of B and (r, n) of A, recorded as SI does along training."""

    kind = "entries"
    of_factors = True

    def __init__(self, by_name: dict[str, Tensor]) -> None:
        self._by_name = by_name
        self._stacked: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Entries:
        """Raises ValueError for a part of a layer alone, or two that do not fit."""
        found = cls(dict(tensors))
        for name in found.names:
            B, A = (tensors.get(name + part, torch.empty(0)) for part in PARTS)
            if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
                raise ValueError(f"the importance of B and of A of {name} do not fit")
        return found

    @classmethod
    def check_settings(cls, rule: RecordRule, storage: str) -> None:
        super().check_settings(rule, storage)
        if rule.estimator != "equivalent" or rule.scaled or rule.xi_relative:
            raise InputError(
                f"{cls.kind.capitalize()} importance looks at the gradients of A and B, not of the "
                "weights that they make: leave out --estimator, --xi-relative and the preset."
            )

    @classmethod
    def trace(cls, groups: list[Group], earlier: Importance | None) -> EntriesTrace:
        return EntriesTrace(groups, earlier)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._by_name)

    def check(self) -> None:
        for name, t in self._by_name.items():
            if not torch.isfinite(t).all() or (t < 0).any():
                raise ValueError(f"the importance of {name} is negative or not finite")

    @classmethod
    def bytes(cls, shapes: Shapes, storage: str = "fp32", sequences: int = 0) -> int:
        return sum(4 * (m + n) * r for m, n, r in shapes)

    @property
    def names(self) -> set[str]:
        return {n.removesuffix(part) for n in self._by_name for part in PARTS if n.endswith(part)}

    def arrange(self, groups: Iterable[Group]) -> None:
        for g in groups:
            here = [tuple(self._by_name[g.names[0] + part].shape) for part in PARTS]
            if here != [(g.m, g.r), (g.r, g.n)]:
                raise MismatchError(
                    f"The importance is of the entries of A and B at rank {here[1][0]}, and "
                    f"{g.names[0]} has rank {g.r}: give the same rank."
                )
            B, A = (g.stack(self._by_name, "{}" + part) for part in PARTS)
            self._stacked[g.names] = B, A

    def norms(self) -> dict[str, float]:
        return {n: v**0.5 for n, v in self._summed(torch.square).items()}

    def totals(self) -> dict[str, float]:
        return self._summed(torch.clone)

    def _summed(self, of: Any) -> dict[str, float]:
        return {
            n: sum(float(of(self._by_name[n + part].double()).sum()) for part in PARTS)
            for n in sorted(self.names)
        }

    def elements(self, groups: Iterable[Group]) -> int:
        return sum(len(g.names) * (g.m + g.n) * g.r for g in groups)

    def pull(self, group: Group, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
        """As for a Ω of θ, 2s times what is returned are the derivatives by B and by A."""
        B, A = self._stacked[group.names]
        dB, dA = _apart(change, group.r)
        GB, GA = B * dB / group.s, A * dA
        values = (GB * dB / group.s).sum((1, 2)) + (GA * dA).sum((1, 2))
        return values, GB / group.s, GA / group.s


class EntriesTrace(Trace):
    """ω = −Σ g·Δ of each entry over the steps, and Ω = max(ω, 0)/(Δ² + ξ), as in SI."""

    parts: ClassVar[tuple[str, ...]] = PARTS

    def __init__(self, groups: Iterable[Group], earlier: Importance | None = None) -> None:
        super().__init__()
        for g in groups:
            self.omega[g.names] = tuple(torch.zeros_like(f) for f in g.factors())
            if isinstance(earlier, Entries):
                before = earlier.tensors()
                self.Omega[g.names] = tuple(g.stack(before, "{}" + part) for part in PARTS)

    def add(self, group: Group, gradient: LowRank, step: LowRank, *, clamp: bool) -> None:
        (gB, gA), (dB, dA) = (_apart(of, group.r) for of in (gradient, step))
        for omega, g, d in zip(self.omega[group.names], (gB, gA), (dB / group.s, dA), strict=True):
            omega.addcmul_(g, d, value=-1)
            if clamp:
                omega.clamp_(min=0)

    def total(self, group: Group) -> Tensor:
        return torch.stack([w.sum(dtype=torch.float64) for w in self.omega[group.names]]).sum()

    def consolidate(self, group: Group, delta: LowRank, xi: Tensor, *, last: bool) -> Tensor:
        dB, dA = _apart(delta, group.r)
        omegas = self.omega[group.names]
        new = [
            w.clamp(min=0) / (d.square() + xi)
            for w, d in zip(omegas, (dB / group.s, dA), strict=True)
        ]
        before = self.Omega.get(group.names, tuple(torch.zeros_like(w) for w in new))
        self.Omega[group.names] = tuple(a + b for a, b in zip(before, new, strict=True))
        negative = torch.stack([(w < 0).sum() for w in omegas]).sum()
        for w in omegas:
            w.zero_()
        return negative

    def importance(self) -> Entries:
        found: dict[str, Tensor] = {}
        for names, both in self.Omega.items():
            keys = ["{}" + part for part in PARTS]
            found |= unstack(names, [t.to(torch.float32) for t in both], keys)
        return Entries(found)


class Laplace(Entries):
    """F_i = E[(∂ log p / ∂i)²] of each entry i of A and B at the weights as they are.

    At the base B = 0, so that F of A is zero there: A is free, and only B is held.
    """

    kind = "laplace"
    trained = False

    @classmethod
    def rows_needed(cls, options: dict[str, Any]) -> int:
        if options.get("method"):
            raise InputError("--fisher-method belongs to --kind fisher, not laplace.")
        return options.get("sequences") or LEAN

    @classmethod
    def gather(
        cls, model: nn.Module, pairs: list[Pair], rows: Tensor, **options: Any
    ) -> tuple[Laplace, dict[str, Any]]:
        """The mean over rows; the options are those of `passes.backward_passes`."""
        factors = {
            name: (b, a, scale)
            for g in group(pairs)
            for name, b, a, scale in zip(g.names, *g.factors(), g.s[:, 0, 0], strict=True)
        }
        sums = {
            name + part: torch.zeros_like(f)
            for name, both in factors.items()
            for part, f in zip(PARTS, both[:2], strict=True)
        }

        def take(name: str, delta: Tensor, x: Tensor) -> None:
            B, A, scale = factors[name]
            delta, x = scale * delta.to(B), x.to(B)
            by_sequence = (delta.mT @ (x @ A.mT), (delta @ B).mT @ x)  # (b, m, r), (b, r, n)
            for part, g in zip(PARTS, by_sequence, strict=True):
                sums[name + part] += g.square().sum(0)

        backward_passes(model, pairs, rows, take, **options)
        notes = {"sequences": len(rows), "labels": options.get("labels", "model")}
        return cls({n: t.float() / len(rows) for n, t in sums.items()}), notes

    @staticmethod
    def describe(summary: dict[str, Any]) -> list[str]:
        return [
            f"Fisher information of {summary['sequences']} sequences on the entries of A and B of "
            f"{summary['layers']} layers."
        ]
