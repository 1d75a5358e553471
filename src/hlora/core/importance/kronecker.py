"""The curvature of each matrix at the base as a Kronecker product, in nats per token (K-FAC).

R_l = ½ tr(G D C Dᵀ)/T, with G ⊗ C ∝ E[ggᵀ] ⊗ E[gᵀg] of whole sequences, scaled to the exact trace
of F. (Martens & Grosse 2015 take tokens for independent.) G and C are p directions and a diagonal,
so nothing is m × m. Layers are held one by one: what several of them change together is not seen,
and the sum is too low by about as much as they do (see `sketch`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hlora.core.importance import Changes, Groups, Pulled, Tensors
from hlora.core.importance.projected import Projected
from hlora.core.importance.sequences import Sequences, total_of
from hlora.core.pairs import Group


class Kronecker(Sequences):
    """By layer: U and V, the factors in them, and what is left of their diagonals."""

    kind = "kronecker"
    weight = 1.0
    """Multiplies R; to be set before `arrange`."""
    parts = ("U", "U_scale", "V", "V_scale", "left", "right", "rows", "columns")

    @classmethod
    def keep(cls, of: Projected, U: Tensor, V: Tensor) -> dict[str, Tensor]:
        return {
            "left": of.left, "right": of.right,
            "rows": (of.rows - ((U @ of.left) * U).sum(1)).clamp(min=0),
            "columns": (of.columns - ((V @ of.right) * V).sum(1)).clamp(min=0),
        }  # fmt: skip

    def arrange(self, groups: Iterable[Group]) -> None:
        self._stacked = {
            g.names: [
                self.stack(g, part) for part in ("U", "left", "rows", "V", "right", "columns")
            ]
            for g in groups
        }
        for stacked in self._stacked.values():
            left, rows = stacked[1:3]
            trace = left.diagonal(dim1=1, dim2=2).sum(1) + rows.sum(1)
            share = (self.weight / (2 * self._tokens * trace)).nan_to_num(posinf=0.0)
            stacked[1], stacked[2] = left * share[:, None, None], rows * share[:, None]

    def pulls(self, groups: Groups, changes: Changes, lefts: Tensors, rights: Tensors) -> Pulled:
        pulled = []
        for group, D, left, right in zip(groups, changes, lefts, rights, strict=True):
            U, inner, rows, V, outer, columns = self._stacked[group.names]
            GP = U @ (inner @ (U.mT @ D.P)) + rows[:, :, None] * D.P
            QC = ((D.Q @ V) @ outer) @ V.mT + D.Q * columns[:, None, :]
            values = ((D.P.mT @ GP) * (QC @ D.Q.mT)).sum(dim=(1, 2))
            pulled.append((values, GP @ (QC @ right.mT), (left.mT @ GP) @ QC))
        return pulled, total_of(pulled)

    def coupling(self, groups: Groups, changes: Changes) -> Tensor:
        sides = [c.P for c in changes], [c.Q for c in changes]
        values = [v for v, _, _ in self.pulls(groups, changes, *sides)[0]]
        return torch.cat([v.to(values[0].device) for v in values]).diag()

    def norms(self) -> dict[str, float]:
        """‖F_l‖₂, the Frobenius norm of G ⊗ C."""
        return {
            n: self._size(n, "U", "left", "rows") * self._size(n, "V", "right", "columns")
            / max(self.totals()[n], 1e-300)
            for n in self.names
        }  # fmt: skip

    def totals(self) -> dict[str, float]:
        of = self._tensors
        return {
            n: float(of[f"{n}.left"].double().trace() + of[f"{n}.rows"].double().sum())
            for n in self.names
        }

    def _size(self, name: str, basis: str, inner: str, rest: str) -> float:
        """‖U inner Uᵀ + diag(rest)‖₂."""
        of = self._tensors
        U = of[f"{name}.{basis}"].double() * of[f"{name}.{basis}_scale"].double()
        S, d = of[f"{name}.{inner}"].double(), of[f"{name}.{rest}"].double()
        gram = U.mT @ U @ S
        crossed = (d[:, None] * (U @ S) * U).sum()
        return float(((gram * gram.mT).sum() + 2 * crossed + d.square().sum()).clamp(min=0).sqrt())
