"""What is remembered of the general task, one file a kind.

A kind answers what `Importance` lists. How it is gathered is its own affair; a kind that is
gathered along the training path also has a `Trace`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from hlora.importance.dense import Dense, DenseTrace
from hlora.lowrank import LowRank
from hlora.pairs import Group


class Importance(Protocol):
    """What the penalty and the store ask of a kind."""

    kind: str

    def arrange(self, groups: Iterable[Group]) -> None:
        """Move to the groups' devices, stacked in their order."""

    def norms(self) -> dict[str, float]:
        """‖Ω_l‖₂ by layer, for Eq. 15."""

    def totals(self) -> dict[str, float]:
        """Σ_i Ω_i by layer."""

    def weigh(self, group: Group, change: LowRank) -> Tensor:
        """R_l of Eq. 14 for each matrix of the group, (L,); differentiable in P and Q."""

    def pull(self, group: Group, change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
        """The same values (L,), with the derivatives by P and by Q."""

    def tensors(self) -> dict[str, Tensor]:
        """By layer name, for the store."""


KINDS = {Dense.kind: Dense}

__all__ = ["KINDS", "Dense", "DenseTrace", "Importance"]
