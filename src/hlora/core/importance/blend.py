"""A sketch with a Kronecker product under it: what is seen is held as it is, the rest smoothly.

The sketch couples all layers but knows N directions only; the Kronecker product knows all
directions but no coupling. R is the sum of both, the second `SMOOTH` times, since it is too low by
about as much. The sketch alone is the meter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from hlora.core.importance.kronecker import Kronecker
from hlora.core.importance.sequences import TOKENS, Projected, Sequences
from hlora.core.importance.sketch import Sketch
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group

SMOOTH = 4.0
"""Weight of the Kronecker product beside the sketch."""


class Blend(Sequences):
    """The parts of both kinds; U and V are shared."""

    kind = "blend"
    parts = tuple(dict.fromkeys((*Kronecker.parts, *Sketch.parts)))

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.smooth, self.sketch = Kronecker(_of(Kronecker, tensors)), Sketch(_of(Sketch, tensors))
        self.smooth.weight = SMOOTH

    @classmethod
    def keep(cls, of: Projected, U: Tensor, V: Tensor) -> dict[str, Tensor]:
        return {**Kronecker.keep(of, U, V), **Sketch.keep(of, U, V)}

    def arrange(self, groups: Iterable[Group]) -> None:
        groups = list(groups)
        self.smooth.arrange(groups)
        self.sketch.arrange(groups)

    def pulls(
        self,
        groups: Sequence[Group],
        changes: Sequence[LowRank],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
        of = groups, changes, lefts, rights
        (seen, forgetting), (smooth, _) = self.sketch.pulls(*of), self.smooth.pulls(*of)
        pulled = [(a + x, b + y, c + z) for (a, b, c), (x, y, z) in zip(seen, smooth, strict=True)]
        return pulled, forgetting

    def forgetting(self, groups: Sequence[Group], changes: Sequence[LowRank]) -> Tensor:
        return self.sketch.forgetting(groups, changes)

    def coupling(self, groups: Sequence[Group], changes: Sequence[LowRank]) -> Tensor:
        return self.sketch.coupling(groups, changes)

    def norms(self) -> dict[str, float]:
        return self.smooth.norms()

    def totals(self) -> dict[str, float]:
        return self.smooth.totals()


def _of(kind: type[Sequences], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that a kind keeps."""
    return {k: t for k, t in tensors.items() if k == TOKENS or k.rpartition(".")[2] in kind.parts}
