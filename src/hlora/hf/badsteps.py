"""Steps whose loss or gradients are not finite: counted, and too many in a row end the run."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from hlora.core.finite import broken_weight
from hlora.errors import DivergedError
from hlora.hf.callbacks import Attached

logger = logging.getLogger(__name__)


class BadSteps(Attached):
    """Stops a run after `limit` bad steps in a row, its last good state saved.

    The steps themselves skip a bad one (`hlora.core.steps`); this counts them, those that mixed
    precision drops included, puts their number and the loss of the others into the logs, and
    keeps the other callbacks from writing a result of a run that diverged. It comes first.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self._in_a_row = self._total = self._logged = 0
        self._before = (0, 0)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        self.begin(args, state)
        steps = self.follow(optimizer)
        steps.restores = True
        self._in_a_row = self._total = self._logged = 0
        self._before = (steps.seen, steps.bad)

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.steps is not None:
            self.steps.begin()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        steps = self.steps
        if steps is None:
            return
        dropped = steps.seen == self._before[0] and args.fp16
        bad = dropped or steps.bad > self._before[1]
        self._before = (steps.seen, steps.bad)
        self._total += bad
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if self._in_a_row >= self.limit:
            control.should_save = steps.restore()
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        steps = self.steps
        if steps is None or logs is None or "loss" not in logs:
            return
        bad, steps.bad_losses = int(steps.bad_losses), torch.zeros(())
        all_of, steps.losses = steps.losses, 0
        if bad:  # they went in as zero
            logs["loss"] = logs["loss"] * all_of / (all_of - bad) if all_of > bad else math.nan
        if self._total > self._logged:
            logs["bad_steps"], self._logged = self._total - self._logged, self._total
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(logs)

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.steps is None:
            return
        if not self._in_a_row:
            self.check_reached(args, state)
        steps, self.steps = self.steps, None
        taken = state.global_step - self._from
        few = self._in_a_row < self.limit and 2 * self._in_a_row <= taken
        finite = steps.finite()  # nobody looks at a loss after the last step
        if finite and (few or not self._in_a_row):
            if self._total:
                logger.warning(
                    "%d of %d steps were skipped because their loss or gradients were not finite.",
                    self._total, taken,
                )  # fmt: skip
            steps.release()
            return
        kept = "nothing was good enough to keep"
        if steps.restore():
            kept = "the weights before them are the model's again"
            if self._in_a_row >= self.limit:
                kept = f"the last good state is in {self.written_to(args, state)}"
        steps.release()
        last = f"the last {self._in_a_row} steps had a loss or gradients"
        if not finite:
            last = "it left weights"
        raise DivergedError(
            f"Training stopped at step {state.global_step}: {last} that are not finite; {kept}. "
            f"{self._cause(args, model, bool(steps.regularizers))}"
        )

    def _cause(self, args: Any, model: Any, held: bool) -> str:
        if name := broken_weight(model):
            return f"Likely cause: the base model's {name} is not finite, so take another copy."
        if self._in_a_row == self._total and self._before[0] == self._before[1]:
            return (
                "Likely cause: the base model on this data, as no step was ever good. Try --dtype "
                "fp32, and look for rows without a single label."
            )
        return (
            f"Likely cause: the learning rate of {args.learning_rate:g}; try a tenth of it"
            + (", or of phi" if held else "")
            + (", or bf16 in place of fp16." if args.fp16 else ".")
        )
