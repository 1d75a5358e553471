"""A kind of importance that is one file: the sign and size of ω by matrix, negative ones included.

It is no good idea, it is the test that a kind owns what is its own.
"""

from __future__ import annotations

import torch

from hlora.core.importance import Importance
from hlora.errors import InputError


class Toy(Importance):
    """One number a matrix, of either sign: R_l = Ω_l ‖D_l‖²."""

    kind = "toy"
    conversions = ("doubled",)

    def __init__(self, by_name):
        self.by_name = by_name

    @classmethod
    def trace(cls, groups, earlier):
        return ToyTrace(groups)

    @classmethod
    def from_tensors(cls, tensors):
        return cls(dict(tensors))

    def tensors(self):
        return self.by_name

    def check(self):
        for name, value in self.by_name.items():
            if value.shape != (1,) or not torch.isfinite(value).all():
                raise ValueError(f"{name} is no number")

    @classmethod
    def bytes(cls, shapes, storage="fp32", sequences=0):
        return sum(4 for _ in shapes)

    def converted(self, to):
        if to != "doubled":
            return super().converted(to)
        return Toy({n: 2 * v for n, v in self.by_name.items()})

    @staticmethod
    def describe(summary):
        return [f"A toy of {summary['layers']} layers."]

    @property
    def names(self):
        return set(self.by_name)

    def arrange(self, groups):
        self.stacked = {g.names: g.stack(self.by_name)[:, 0] for g in groups}

    def norms(self):
        return {n: float(v.abs().sum()) for n, v in self.by_name.items()}

    def totals(self):
        return {n: float(v.abs().sum()) for n, v in self.by_name.items()}

    def pull(self, group, change, left, right):
        u = self.stacked[group.names][:, None, None]
        values = self.stacked[group.names] * change.sum_of_squares()
        P, Q = change.P, change.Q
        return values, u * (P @ (Q @ right.mT)), u * ((left.mT @ P) @ Q)


class ToyTrace:
    def __init__(self, groups):
        self.sums = {g.names: torch.zeros(len(g.pairs), dtype=torch.float64) for g in groups}

    def add(self, group, gradient, step, *, clamp):
        if clamp:
            raise InputError("a toy is not clamped")
        self.sums[group.names] -= gradient.marginals(step)[0].sum(1).double()

    def total(self, group):
        return self.sums[group.names].sum()

    def consolidate(self, group, delta, xi, *, last):
        return (self.sums[group.names] < 0).sum()

    def importance(self):
        return Toy(
            {
                n: -(v.float().abs().reshape(1))  # negative on purpose
                for names, sums in self.sums.items()
                for n, v in zip(names, sums, strict=True)
            }
        )

    def state(self):
        return {n: v.reshape(1) for names, s in self.sums.items() for n, v in zip(names, s)}  # noqa: B905

    def load_state(self, groups, state):
        for g in groups:
            self.sums[g.names] = torch.cat([state[n] for n in g.names])
