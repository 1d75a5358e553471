"""Looks at the predictions themselves, which correct a quadratic while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hlora.core.pairs import Group, unstack
from hlora.core.regularizer import Gradients

ROWS = 4
"""Of text, in a look."""
SHARE = 0.5
"""Of the newest look in what corrects. The rest is of earlier ones, which saw other rows."""
_KEYS = ("looks.B.{}", "looks.A.{}")


class Looks:
    """∇KL − ∇R, as it was at the last looks, which corrects the gradients of R.

    R is the quadratic of the base model. Near it R is the KL divergence; further away the two part,
    and a training that R alone holds is kept out of places where nothing would be forgotten, and
    let into others. So once in `every` steps ∇KL is taken on some rows, and until the next look R
    tells only how the pull has changed since. Where R is blind nothing tells that: whoever adds the
    correction keeps it smaller than the task's gradient, or Adam runs along one look until the
    next.

    Args:
        pull: ∇KL on some of the rows, given their numbers, at the present weights.
        rows: how many there are, taken in turn.
        every: optimizer steps from one look to the next.
    """

    def __init__(
        self, pull: Callable[[Tensor, list[Group]], Gradients], rows: int, every: int
    ) -> None:
        self.pull, self.rows, self.every = pull, rows, every
        self.taken = 0
        self.found: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def correction(
        self, groups: list[Group], gradients: Gradients, phi: float | Tensor
    ) -> Gradients | None:
        """Times φ, where the gradients are φ·∇R of each group; None before the first look."""
        self.taken += 1
        if self.taken % self.every == 0:
            index = in_turn(self.taken // self.every, ROWS, self.rows)
            self._learn(groups, self.pull(index, groups), gradients, phi)
        if not self.found:
            return None
        both = (self.found[g.names] for g in groups)
        return [(phi * B, phi * A) for B, A in both]

    def _learn(
        self, groups: list[Group], seen: Gradients, gradients: Gradients, phi: float | Tensor
    ) -> None:
        """What this look saw joins what the earlier ones did. One that is not finite saw nothing:
        in half precision a row may overflow."""
        flags = [t.isfinite().all() for both in seen for t in both]
        finite = torch.stack([f.to(flags[0].device) for f in flags]).all()
        for g, true, ours in zip(groups, seen, gradients, strict=True):
            new = [t - o / phi for t, o in zip(true, ours, strict=True)]
            before = self.found.get(g.names)
            old = (
                [torch.where(finite.to(n.device), n, 0) for n in new] if before is None else before
            )
            B, A = (
                torch.where(finite.to(n.device), o.lerp(n, SHARE), o)
                for o, n in zip(old, new, strict=True)
            )
            self.found[g.names] = B, A

    def state(self) -> dict[str, Tensor]:
        found = {"looks.taken": torch.tensor([self.taken])}
        for names, both in self.found.items():
            found |= unstack(names, both, _KEYS)
        return found

    def load_state(
        self, tensors: dict[str, Tensor], like: Mapping[tuple[str, ...], tuple[Tensor, Tensor]]
    ) -> None:
        """From a checkpoint; by names as `like`, and with its devices and dtypes."""
        self.taken = int(tensors.get("looks.taken", torch.zeros(1)))
        for names, (B, A) in like.items():
            if _KEYS[0].format(names[0]) in tensors:
                b, a = (torch.stack([tensors[key.format(n)] for n in names]) for key in _KEYS)
                if b.isfinite().all() and a.isfinite().all():
                    self.found[names] = b.to(B), a.to(A)


def in_turn(look: int, count: int, rows: int) -> Tensor:
    """The numbers of the `count` rows that the first, second, ... look takes, of so many."""
    return torch.arange((look - 1) * count, look * count) % rows
