"""Watching an optimizer step, in any training loop.

Trainer's own callbacks also fire around a step that the fp16 scaler skips, and know nothing of
its scale. Hooks on the optimizer fire around the real step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

Watcher = Callable[[Optimizer], None]


class StepWatchers:
    """Those who look on before a step, those who add to its gradients, those who look after.

    Those who look on always come first: the recorder must see the task's gradient alone,
    whichever callback was added first.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.observe: list[Watcher] = []
        self.add: list[Watcher] = []
        self.after: list[Watcher] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watcher in [*self.observe, *self.add]:
            watcher(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watcher in list(self.after):
            watcher(optimizer)

    def forget(self, *watchers: Watcher) -> None:
        for watcher in watchers:
            for watching in (self.observe, self.add, self.after):
                if watcher in watching:
                    watching.remove(watcher)


_WATCHED: WeakKeyDictionary[Optimizer, StepWatchers] = WeakKeyDictionary()


def watchers(optimizer: Any) -> StepWatchers:
    """The watchers of the torch optimizer inside accelerate's wrapper."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if optimizer not in _WATCHED:
        _WATCHED[optimizer] = StepWatchers(optimizer)
    return _WATCHED[optimizer]


def pending_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor that gradients still carry: torch's GradScaler leaves it to fused optimizers."""
    return getattr(optimizer, "grad_scale", None)
