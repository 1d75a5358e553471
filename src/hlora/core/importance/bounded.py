"""Sums over sequences in which a few runaways do not outweigh all others.

½(g·D)²/T is the KL divergence of a change D that is small beside 1/‖g‖. Beyond it is far too much,
and some sequences stand at a switch: later layers rest on a text's first token (an attention sink),
whose norm grows many times over in the first few. Where a rare token gets there by half, all that
follows hangs on the first block's v_proj: of SmolLM2's own text ‖g‖² was 219 times the median's
there, and in bf16 4,430 times (docs/base.md). So at each matrix a sequence counts for no more than
`LIMIT` times the median one: a winsorized mean. At most one in `RARE` is bounded; where more are
beyond, sequences differ that much, and the next is the limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hlora.errors import DivergedError

LIMIT = 10.0
"""How many times the median sequence's ‖g‖² one counts for at most."""
RARE = 16
"""One sequence in so many, at most, is bounded."""


class Bounded:
    """Sums of what `count` sequences add, batch by batch; the largest are held apart to the end."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.apart = name, -(-count // RARE)
        self.seen: list[Tensor] = []
        self.sums: tuple[Tensor, ...] = ()
        self.sizes = torch.empty(0)
        self.held: tuple[Tensor, ...] = ()

    def add(self, sizes: Tensor, *parts: Tensor) -> None:
        """‖g‖² of a batch's sequences, (b,), and what each adds to the sums, (b, ...)."""
        self.seen.append(sizes)
        if not self.sums:
            self.sums = tuple(torch.zeros_like(p[0]) for p in parts)
            self.sizes, self.held = sizes[:0], tuple(p[:0] for p in parts)
        sizes = torch.cat([self.sizes, sizes])
        order = sizes.argsort(descending=True, stable=True)
        held, rest = order[: self.apart], order[self.apart :]
        both = [torch.cat(p) for p in zip(self.held, parts, strict=True)]
        for total, part in zip(self.sums, both, strict=True):
            total += part[rest].sum(0)
        self.sizes, self.held = sizes[held], tuple(part[held] for part in both)

    def finish(self) -> tuple[Tensor, list[Tensor]]:
        """How much of each sequence counts, (N,), 1 but for runaways; and the sums.

        Raises:
            DivergedError: a gradient is not finite.
        """
        sizes = torch.cat(self.seen)
        if not torch.isfinite(sizes).all():
            raise DivergedError(
                f"The gradient of a sequence at {self.name} is not finite: try --dtype fp32, or, "
                "if it was that, another copy of the model."
            )
        reached = sizes[sizes > 0]  # not all sequences reach each expert
        if not len(reached):
            return torch.ones_like(sizes), [*self.sums]
        beyond = sizes.sort(descending=True).values[self.apart :]
        limit = torch.cat([LIMIT * reached.median()[None], beyond[:1]]).amax()
        shares, of_held = (_shares(limit, s) for s in (sizes, self.sizes))
        return shares, [
            total + torch.einsum("b,b...->...", of_held.to(part), part)
            for total, part in zip(self.sums, self.held, strict=True)
        ]


def _shares(limit: Tensor, sizes: Tensor) -> Tensor:
    return torch.where(sizes > limit, limit / sizes, torch.ones_like(sizes))
