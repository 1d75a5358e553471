"""What is remembered of the general task, one file a kind.

A kind answers what `Importance` lists. How it is gathered is its own affair; a kind that is
gathered along the training path also has a `Trace`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from hlora.core.importance.dense import Dense, DenseTrace
from hlora.core.importance.factored import Factored, FactoredTrace
from hlora.core.importance.fisher import Fisher
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group


class Importance(Protocol):
    """What the penalty and the store ask of a kind."""

    kind: str

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Importance:
        """From what `tensors` gave. Raises ValueError where they do not fit together."""

    @property
    def names(self) -> set[str]:
        """The layers."""

    def arrange(self, groups: Iterable[Group]) -> None:
        """Move to the groups' devices, stacked in their order."""

    def norms(self) -> dict[str, float]:
        """‖Ω_l‖₂ by layer, for Eq. 15."""

    def totals(self) -> dict[str, float]:
        """Σ_i Ω_i by layer."""

    def weigh(self, group: Group, change: LowRank) -> Tensor:
        """R_l of Eq. 14 for each matrix of the group, (L,); differentiable in P and Q."""

    def pull(
        self, group: Group, change: LowRank, left: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same values, and half the gradient from two sides: see `hlora.core.ops.weigh`."""

    def tensors(self) -> dict[str, Tensor]:
        """By layer name, for the store."""


class Trace(Protocol):
    """What `Record` asks of a kind that is gathered along the training path.

    Made from the groups, and the tensors of an earlier task's importance or None.
    """

    def add(self, group: Group, gradient: LowRank, step: LowRank, *, clamp: bool) -> None:
        """One optimizer step (Eq. 12); `clamp` sets negative ω to zero after it."""

    def total(self, group: Group) -> Tensor:
        """Σ_i ω_i over the group, a float64 scalar."""

    def consolidate(self, group: Group, delta: LowRank, xi: Tensor, *, last: bool) -> Tensor:
        """Add to Ω and reset ω (Eq. 13). Returns the number of negative ω."""

    def importance(self) -> Importance:
        """Ω, for the store."""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""

    def load_state(self, groups: Iterable[Group], state: dict[str, Tensor]) -> None:
        """From a checkpoint."""


KINDS: dict[str, type[Importance]] = {k.kind: k for k in (Dense, Factored, Fisher)}
TRACES: dict[str, type[DenseTrace] | type[FactoredTrace]] = {
    Dense.kind: DenseTrace,
    Factored.kind: FactoredTrace,
}

__all__ = ["KINDS", "TRACES", "Dense", "Factored", "Fisher", "Importance", "Trace"]
