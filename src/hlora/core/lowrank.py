"""A change of a weight matrix as the product of two thin ones.

Everything that this method looks at has this form: a step, a gradient, the distance from the
anchor. None of it is ever multiplied out here; only `hlora.core.ops` does that, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Weighed = tuple[Tensor, Tensor, Tensor]
"""Σ_i Ω_i D_i² of each matrix (L,), and half its gradient, G = Ω∘D, seen from two sides: G rightᵀ
(L, m, r) and leftᵀ G (L, r, n). With θ = s·B A and D = θ − θ^ν, 2s·G Aᵀ and 2s·BᵀG are the
derivatives by B and by A."""


@dataclass(frozen=True)
class LowRank:
    """The matrices P Q, a batch of L that share a shape: P (L, m, k) and Q (L, k, n)."""

    P: Tensor
    Q: Tensor

    def __post_init__(self) -> None:
        if self.P.ndim != 3 or self.Q.ndim != 3 or self.P.shape[::2] != self.Q.shape[:2]:
            raise ValueError(
                f"P (L, m, k) and Q (L, k, n) do not fit: {tuple(self.P.shape)} and "
                f"{tuple(self.Q.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, m, n)."""
        return (self.P.shape[0], self.P.shape[1], self.Q.shape[2])

    @classmethod
    def moved(cls, B0: Tensor, A0: Tensor, B1: Tensor, A1: Tensor, s: Tensor) -> LowRank:
        """s (B₁A₁ − B₀A₀), written as s [(B₁−B₀) | B₀] [A₁ ; A₁−A₀].

        Subtracting two products would lose the digits that matter when the step is small.

        Args:
            B0, B1: (L, m, r), before and after.
            A0, A1: (L, r, n), before and after.
            s: (L, 1, 1), LoRA's scaling of each matrix.
        """
        return cls(torch.cat([s * (B1 - B0), s * B0], dim=2), torch.cat([A1, A1 - A0], dim=1))

    def sum_of_squares(self) -> Tensor:
        """Σ_ij (PQ)_ij² of each matrix, (L,), from two k × k Gram matrices."""
        return ((self.P.mT @ self.P) * (self.Q @ self.Q.mT)).sum(dim=(1, 2))

    def marginals(self, other: LowRank) -> tuple[Tensor, Tensor]:
        """Row sums (L, m) and column sums (L, n) of the elementwise product (P₁Q₁) ∘ (P₂Q₂).

        Exact, in O((m + n) k²): Σ_j (P₁Q₁)_ij (P₂Q₂)_ij = Σ_ab P₁[i,a] P₂[i,b] (Q₁Q₂ᵀ)[a,b].
        """
        rows = ((self.P @ (self.Q @ other.Q.mT)) * other.P).sum(dim=2)
        columns = (((other.P.mT @ self.P) @ self.Q) * other.Q).sum(dim=1)
        return rows, columns

    def weigh_rank_one(self, u: Tensor, v: Tensor, left: Tensor, right: Tensor) -> Weighed:
        """This change weighed by Ω = u vᵀ.

        From k × k matrices alone: Σ_ab (Pᵀ diag(u) P)_ab (Q diag(v) Qᵀ)_ab.

        Args:
            u: (L, m), v: (L, n).
            left: (L, m, r), right: (L, r, n).
        """
        uP, Qv = u[:, :, None] * self.P, self.Q * v[:, None, :]
        values = ((self.P.mT @ uP) * (Qv @ self.Q.mT)).sum(dim=(1, 2))
        return values, uP @ (Qv @ right.mT), (left.mT @ uP) @ Qv
