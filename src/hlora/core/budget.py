"""A budget of forgetting in place of φ: φ is steered so that what is predicted stays within it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hlora.core.looks import ROWS, in_turn
from hlora.core.pairs import Group
from hlora.core.quadratic import Quadratic
from hlora.core.regularizer import Pull
from hlora.errors import InputError, is_number

logger = logging.getLogger(__name__)

LEAST = 1e-6
"""Nats per token: a difference of two losses in float32 tells no less."""
RAMP = 0.1
"""Share of the steps over which the budget opens: a model may not spend it all at the start."""
GAIN, LEVEL_GAIN = 2.0, 0.1
"""Log φ is its level and GAIN times the e-folds by which the forgetting is off the budget; the
level moves by LEVEL_GAIN times them, at most, a step. Without the first φ swings by orders."""
SETTLED = 10.0
"""E-folds that the level may at least move in a run, however short."""
MOST = 3.0
"""E-folds that count."""
FIRST, LOWEST, HIGHEST = 1.0, 1e-6, 1e6
"""φ at the start, and its bounds."""
LOOKS = 16
"""How often in a run forgetting is measured, to correct what the importance predicts."""
FURTHEST = 100.0
"""A correction beyond which a measurement says nothing."""
MOST_PULL = 10.0
"""Times the task's gradient: more turns no step further, and Adam's mean square remembers it."""
TRIES, CLOSE = 6, 1.02
"""Scalings at the end, and how far above the budget is near enough."""


class Gauge(Protocol):
    """Measures forgetting on some rows of text."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def __call__(self, part: Tensor | slice) -> Tensor:
        """On a part of them: nats per token, a scalar on the device."""
        ...


class Budgeted(Quadratic):
    """Holds θ to the base model as strongly as a budget asks for.

    Dual ascent on log φ, with a proportional term that damps it. What the importance predicts costs
    next to nothing and is asked at every step, but a training that it pulls soon leaves the
    directions that it knows (on SmolLM2 it then predicted an eighth of what was true). So every
    1/`LOOKS` of the run forgetting is measured, and κ, what was measured over what was predicted,
    corrects the prediction.

    Nothing leaves the device: φ is a tensor there.

    Args:
        at_most: nats per token of KL divergence from the base model.
        steps: optimizer steps of the whole run.
        gauges: measure it, each on text of its own, and the largest counts; without one κ is 1.
        of: as for `Quadratic`; the importance must predict forgetting.

    Attributes:
        taken: steps so far.
        predicted, left, share: what `keep` gave when training ended.

    Raises:
        InputError: a budget that is no positive number.
    """

    def __init__(self, at_most: float, steps: int, gauges: Sequence[Gauge], *of: Any) -> None:
        check_budget(at_most)
        super().__init__(*of)
        device = next(iter(self.anchor.values()))[0].device
        self.at_most, self.steps, self.gauges, self.taken = at_most, steps, gauges, 0
        self.phi: Tensor = torch.tensor(FIRST, device=device)
        self.predicted: float | None = None
        self.left, self.share = 0.0, 1.0
        self.level, self.log_kappa = (torch.zeros((), device=device) for _ in range(2))

    def before_step(self, groups: list[Group]) -> Pull:
        return replace(super().before_step(groups), most=MOST_PULL)

    @torch.no_grad()
    def steer(self, pull: Pull) -> Tensor:
        assert pull.forgetting is not None
        self.taken += 1
        every = max(1, math.ceil(self.steps / LOOKS))
        if self.gauges and self.taken % every == 0:
            self._look(pull.forgetting, self.taken // every)
        forgetting = pull.forgetting.to(self.phi) * self.log_kappa.exp()
        opened = min(1.0, self.taken / max(RAMP * self.steps, 1))
        over = (forgetting / (self.at_most * opened)).log().clamp(-MOST, MOST)
        gain = max(LEVEL_GAIN, SETTLED / max(self.steps, 1))
        least = -1 if self.taken > RAMP * self.steps else 0  # at first nothing is forgotten yet
        self.level += gain * over.clamp(least, 1)
        self.level.clamp_(math.log(LOWEST), math.log(HIGHEST))
        self.phi.copy_((self.level + GAIN * over).exp()).clamp_(LOWEST, HIGHEST)
        return forgetting

    def _look(self, predicted: Tensor, count: int) -> None:
        """κ as these rows tell it, averaged with what was known: of others. What overflowed in half
        precision tells nothing."""
        parts = [in_turn(count, ROWS, len(gauge)) for gauge in self.gauges]
        measured = self._measured(parts).to(self.phi)
        kappa = measured.clamp(min=LEAST) / predicted.to(self.phi).clamp(min=LEAST)
        kappa = kappa.log().clamp(-math.log(FURTHEST), math.log(FURTHEST))
        kappa = kappa if count == 1 else (self.log_kappa + kappa) / 2
        self.log_kappa.copy_(torch.where(kappa.isfinite(), kappa, self.log_kappa))

    def state(self) -> dict[str, Tensor]:
        steered = {"level": self.level.cpu(), "log_kappa": self.log_kappa.cpu()}
        return super().state() | steered

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        for name in ("level", "log_kappa"):
            here = getattr(self, name)
            here.copy_(tensors.get(name, here))

    def at_end(self, groups: list[Group]) -> None:
        self.predicted, self.left, self.share = self.keep(groups)

    def let_go(self) -> None:
        super().let_go()
        self.gauges = ()

    @torch.no_grad()
    def keep(self, groups: list[Group]) -> tuple[float, float, float]:
        """Scale B down until what is measured (without a gauge: predicted) is within the budget.

        D = s·B·A from the base model, so near it forgetting falls with the square of the scale.
        Where that leads nowhere the scale is found by halves. Where more is forgotten even without
        them, by what is trained beside them, or the model gives no finite predictions, they stay
        as they are. Returns what it was, what it is, and the scale.
        """
        whole = [g.factors() for g in groups]

        def go(share: float) -> None:
            for g, (B, A) in zip(groups, whole, strict=True):
                g.set_factors(B * share, A)

        def at(share: float) -> float:
            go(share)
            return self._forgotten(groups)

        first = forgotten = self._forgotten(groups)
        share, enough = 1.0, self.at_most * CLOSE
        if not math.isfinite(first):
            logger.warning(
                "The budget of %g nats per token is not kept: the model's predictions are not "
                "finite, so that the matrices that are held stay as they are.", self.at_most,
            )  # fmt: skip
            return first, first, share
        for _ in range(TRIES):
            if not enough < forgotten < math.inf:
                break
            share *= math.sqrt(self.at_most / forgotten)
            forgotten = at(share)
        if forgotten <= enough:
            return first, forgotten, share
        rest = at(0.0)
        low, left, high = 0.0, rest, share
        for _ in range(TRIES if rest <= enough else 0):
            share = (low + high) / 2
            forgotten = at(share)
            if forgotten <= enough:
                low, left = share, forgotten
            else:
                high = share
        if low > 0:
            go(low)
            return first, left, low
        logger.warning(
            "The budget of %g nats per token is not kept: %.2g are forgotten, and %.2g without the "
            "matrices that are held, which stay as they are.", self.at_most, first, rest,
        )  # fmt: skip
        go(1.0)
        return first, first, 1.0

    def _forgotten(self, groups: list[Group]) -> float:
        if not self.gauges:
            return float(self.predict(groups))
        return float(self._measured([slice(None)] * len(self.gauges)))

    def measure(self) -> Tensor:
        """As it is done while training, on the first rows."""
        return self._measured([in_turn(1, ROWS, len(gauge)) for gauge in self.gauges])

    def _measured(self, parts: Sequence[Tensor | slice]) -> Tensor:
        both = zip(self.gauges, parts, strict=True)
        return torch.stack([gauge(part) for gauge, part in both]).amax()


def check_budget(at_most: float) -> None:
    """Raise InputError for a budget that is no positive number, or too small to be measured."""
    if not (is_number(at_most) and at_most >= LEAST):
        raise InputError(f"forget_at_most must be a number of {LEAST:g} or more, not {at_most!r}.")
