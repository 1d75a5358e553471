"""The same two additions in plain torch, as one would write them first: the peers of the benchmark.

Each multiplies the thin matrices out, pair by pair; the penalty goes through autograd.
"""

from __future__ import annotations

import torch

from hlora.core.pairs import Pair
from hlora.core.steps import steps_of


class PlainRecord:
    """Eq. 10-12 on dense matrices."""

    def __init__(self, pairs: list[Pair], optimizer: torch.optim.Optimizer) -> None:
        self.pairs = pairs
        self.omega = [torch.zeros(p.shape[:2], device=p.B.device) for p in pairs]
        steps_of(optimizer).observers.append(self.before)
        steps_of(optimizer).after.append(self.after)

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer) -> None:
        eta = optimizer.param_groups[0]["lr"]
        self.seen = []
        for p in self.pairs:
            B, A, gB, gA = p.B.float(), p.A.float(), p.B.grad.float(), p.A.grad.float()
            self.seen.append((gB @ A + B @ gA - eta * gB @ gA, B @ A))

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        for p, omega, (g, before) in zip(self.pairs, self.omega, self.seen, strict=True):
            omega -= g * (p.s * (p.B.float() @ p.A.float() - before))


class PlainPenalty:
    """Eq. 14-16 by autograd on dense matrices."""

    def __init__(
        self,
        pairs: list[Pair],
        optimizer: torch.optim.Optimizer,
        Omega: dict[str, torch.Tensor],
        phi: float,
    ) -> None:
        self.pairs, self.phi = pairs, phi
        self.Omega = [Omega[p.name].to(p.B.device, torch.float32) for p in pairs]
        self.anchor = [(p.s * p.B @ p.A).detach() for p in pairs]
        steps_of(optimizer).observers.append(self.add)

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            R = sum(
                (O * (p.s * p.B @ p.A - anchor) ** 2).sum()
                for p, O, anchor in zip(self.pairs, self.Omega, self.anchor, strict=True)
            )
            (self.phi * R).backward()
