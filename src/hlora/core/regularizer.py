"""What is added to the task's loss, as a thing of its own: the contract of a regularizer.

It has two faces, and needs one of them. `before_step` adds gradients in closed form, once per
optimizer step: for what depends on the weights alone. `on_forward` adds to the loss of a
micro-batch: for what depends on the data, such as a distance from another model's predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hlora.core.pairs import Group

Gradients = list[tuple[Tensor, Tensor]]
"""By B (L, m, r) and A (L, r, n), a pair a group."""


@dataclass(frozen=True)
class Pull:
    """What a regularizer adds at one step.

    Attributes:
        R: its value before φ, a scalar on any device.
        gradients: of φ·R by B (L, m, r) and A (L, r, n), one pair for each group.
        forgetting: what it predicts that the model has forgotten, nats per token, a scalar.
        correction: added to the gradients, and no larger than the task's own, by the norm.
        most: how many times as large as the task's own all of it may be, by the norm.
        last: the norm of the task's own at the last step that had any, a scalar that is kept up to
            date where there are limits.
    """

    R: Tensor
    gradients: Gradients
    forgetting: Tensor | None = None
    correction: Gradients | None = None
    most: float = math.inf
    last: Tensor | None = None


class Regularizer:
    """Adds φ·R to what is minimized.

    Attributes:
        phi: φ of Eq. 16, read at every step, so it may change while training. A float, or a scalar
            tensor on the device.
    """

    phi: float | Tensor = 1.0

    @property
    def off(self) -> bool:
        """φ = 0: the step is then plain training, bit for bit."""
        return not isinstance(self.phi, Tensor) and self.phi == 0

    @property
    def acts_on_data(self) -> bool:
        """Whether it has the second face."""
        return type(self).on_forward is not Regularizer.on_forward

    def check(self, model: nn.Module) -> None:
        """Refuse a model that it cannot act on, before a step is paid for."""

    def before_step(self, groups: list[Group]) -> Pull | None:
        """The gradients to add before an optimizer step; None for none."""
        return None

    def steer(self, pull: Pull) -> Tensor | None:
        """Set φ for the next step; called once a step with what was pulled.

        Returns the forgetting that is to be logged.
        """
        return pull.forgetting

    def at_end(self, groups: list[Group]) -> None:
        """Training has ended: the last word on the weights."""

    def let_go(self) -> None:
        """Nothing is regularized any more: keep nothing of the model, which may be deleted."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside φ."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """From a checkpoint."""

    def on_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:
        """R of one micro-batch as a mean, differentiable in the model's weights; None for none.

        Its gradient joins that of the micro-batch, divided by the number of micro-batches of the
        step; φ is multiplied outside.
        """
        return None
