"""Looks at the predictions themselves, which correct a quadratic while training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hlora.core.pairs import Group

BATCH = 4
"""Rows of a look."""
SHARE = 0.5
"""Of a new look in what corrects; the rest is of earlier ones, whose rows were others."""

Gradients = list[tuple[Tensor, Tensor]]
"""By B (L, m, r) and A (L, r, n), a pair a group."""


class Looks:
    """Adds ∇KL − ∇R, as it was at the last looks, to the gradients of R.

    R is the quadratic of the base model: near it R is the KL divergence, further away the
    divergence leaves it, and a training that R alone holds is kept out of places where nothing
    would be forgotten, and let into others. Once in `every` steps ∇KL is taken on some rows. Until
    the next look R carries only the change.

    Args:
        pull: ∇KL on rows of tokens, at the present weights.
        rows: (N, T) tokens, taken in turn.
        every: optimizer steps from one look to the next.
    """

    def __init__(
        self, pull: Callable[[Tensor, list[Group]], Gradients], rows: Tensor, every: int
    ) -> None:
        self.pull, self.rows, self.every = pull, rows, every
        self.taken = 0
        self.found: Gradients = []

    def correct(self, groups: list[Group], gradients: Gradients, phi: float | Tensor) -> Gradients:
        """φ·∇R corrected, by group."""
        self.taken += 1
        if self.taken % self.every == 0:
            start = (self.taken // self.every - 1) * BATCH
            index = torch.arange(start, start + BATCH) % len(self.rows)
            true = self.pull(self.rows[index], groups)
            new = [
                (tB - dB / phi, tA - dA / phi)
                for (tB, tA), (dB, dA) in zip(true, gradients, strict=True)
            ]
            old = self.found or new
            self.found = [
                (b.lerp(nb, SHARE), a.lerp(na, SHARE))
                for (b, a), (nb, na) in zip(old, new, strict=True)
            ]
        if not self.found:
            return gradients
        return [
            (dB + phi * b, dA + phi * a)
            for (dB, dA), (b, a) in zip(gradients, self.found, strict=True)
        ]
