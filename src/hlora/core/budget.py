"""A budget of forgetting in place of φ: φ is steered so that what is predicted stays within it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hlora.core.pairs import Group
from hlora.core.quadratic import Quadratic
from hlora.core.regularizer import Pull
from hlora.errors import InputError

LEAST = 1e-6
"""Nats per token: a difference of two losses in float32 tells no less."""
RAMP = 0.1
"""Share of the steps over which the budget opens: a model may not spend it all at the start."""
GAIN, LEVEL_GAIN = 2.0, 0.1
"""Log φ is its level and GAIN times the e-folds by which the forgetting is off the budget; the
level moves by LEVEL_GAIN times them, at most, a step. Without the first φ swings by orders."""
MOST = 3.0
"""E-folds that count."""
FIRST, LOWEST, HIGHEST = 1.0, 1e-6, 1e6
"""φ at the start, and its bounds."""


class Budgeted(Quadratic):
    """Holds θ to the base model as strongly as a budget asks for.

    Dual ascent on log φ, with a proportional term that damps it.

    Nothing leaves the device: φ is a tensor there.

    Args:
        at_most: nats per token of KL divergence from the base model, as the importance predicts.
        steps: optimizer steps of the whole run.
        of: as for `Quadratic`; the importance must predict forgetting.

    Raises:
        InputError: a budget that is no positive number.
    """

    def __init__(self, at_most: float, steps: int, *of: Any) -> None:
        check_budget(at_most)
        super().__init__(*of)
        device = next(iter(self.anchor.values()))[0].device
        self.at_most, self.steps = at_most, steps
        self.phi: Tensor = torch.tensor(FIRST, device=device)
        self.taken, self.level = (torch.zeros((), device=device) for _ in range(2))

    @torch.no_grad()
    def steer(self, pull: Pull) -> None:
        assert pull.forgetting is not None
        self.taken += 1
        opened = (self.taken / max(RAMP * self.steps, 1)).clamp(max=1)
        over = (pull.forgetting.to(self.phi) / (self.at_most * opened)).log().clamp(-MOST, MOST)
        self.level += LEVEL_GAIN * over.clamp(-1, 1)
        self.level.clamp_(math.log(LOWEST), math.log(HIGHEST))
        self.phi.copy_((self.level + GAIN * over).exp()).clamp_(LOWEST, HIGHEST)

    def state(self) -> dict[str, Tensor]:
        return {"level": self.level.cpu()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.level.copy_(tensors.get("level", self.level))

    @torch.no_grad()
    def keep(self, groups: list[Group]) -> float:
        """Scale B down until the prediction is within the budget; returns what was predicted.

        D = s·B·A from the base model, so the prediction falls with the square of the scale.
        """
        predicted = float(self.predict(groups))
        if predicted > self.at_most:
            for g in groups:
                B, A = g.factors()
                g.set_factors(B * math.sqrt(self.at_most / predicted), A)
        return predicted


def check_budget(at_most: float) -> None:
    """Raise InputError for a budget that is no positive number, or too small to be measured."""
    if not (math.isfinite(at_most) and at_most >= LEAST):
        raise InputError(f"forget_at_most must be {LEAST:g} nats or more, not {at_most}.")
