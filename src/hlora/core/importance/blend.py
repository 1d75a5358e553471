"""A sketch with a Kronecker product under it: what is seen is held as it is, the rest smoothly.

The sketch couples all layers but knows N directions only; the Kronecker product knows all
directions but no coupling. R is the sum of both, the second `SMOOTH` times, since it is too low by
about as much. The sequences of the sketch that do not pull are the meter.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hlora.core.importance import Changes, Groups, Pulled, Tensors
from hlora.core.importance.kronecker import Kronecker
from hlora.core.importance.projected import Projected
from hlora.core.importance.sequences import Sequences
from hlora.core.importance.sketch import Sketch
from hlora.core.pairs import Group

SMOOTH = 4.0
"""Weight of the Kronecker product beside the sketch."""


class Blend(Sequences):
    """The parts of both kinds; U and V are shared."""

    kind = "blend"
    parts = tuple(dict.fromkeys((*Kronecker.parts, *Sketch.parts)))

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.smooth, self.sketch = Kronecker(tensors), Sketch(tensors)  # each takes its parts
        self.smooth.weight = SMOOTH

    @classmethod
    def keep(cls, of: Projected, U: Tensor, V: Tensor) -> dict[str, Tensor]:
        return {**Kronecker.keep(of, U, V), **Sketch.keep(of, U, V)}

    def arrange(self, groups: Iterable[Group]) -> None:
        groups = list(groups)
        self.smooth.arrange(groups)
        self.sketch.arrange(groups)

    def pulls(self, groups: Groups, changes: Changes, lefts: Tensors, rights: Tensors) -> Pulled:
        of = groups, changes, lefts, rights
        (seen, forgetting), (smooth, _) = self.sketch.pulls(*of), self.smooth.pulls(*of)
        pulled = [(a + x, b + y, c + z) for (a, b, c), (x, y, z) in zip(seen, smooth, strict=True)]
        return pulled, forgetting

    def forgetting(self, groups: Groups, changes: Changes) -> Tensor:
        return self.sketch.forgetting(groups, changes)

    def coupling(self, groups: Groups, changes: Changes) -> Tensor:
        return self.sketch.coupling(groups, changes)

    def norms(self) -> dict[str, float]:
        return self.smooth.norms()

    def totals(self) -> dict[str, float]:
        return self.smooth.totals()
