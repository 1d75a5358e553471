"""What happens around an optimizer step: who watches it, what is added, what is logged.

A step whose loss or gradients are not finite is skipped: nobody sees it and no weight moves.
Hooks on the torch optimizer fire around the real step only, in any training loop. A trainer's own
callbacks also fire for a step that mixed precision drops because of infinite gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from hlora.core.pairs import Group
from hlora.core.regularizer import Gradients, Pull, Regularizer
from hlora.core.sharded import anywhere, anywhere_held, local

Watcher = Callable[[Optimizer], None]


class Steps:
    """The steps of one optimizer, shared by everything that attaches to it.

    Before a step the observers run first, then the regularizers add their gradients: a recorder
    does not see what is added in closed form, whatever was attached first.

    Attributes:
        measure: also measure gradient norms at the coming step.
        seen: how many steps there were with a gradient; where another optimizer takes them during
            backward, none is left.
        forward: φ and R of the micro-batches of the coming step, R divided by their number.
        largest_ratio: of the gradient norms measured so far, the added over the task's.
        bad: how many steps were skipped, their loss or a gradient not being finite.
        losses: how many micro-batches there were since the last log, where they are told.
        bad_losses: those of them whose loss is not finite.
        told: whether what nothing holds has been named.
        undo: called when the last step turns out to have led nowhere.
        restores: whether somebody may go back to the weights of the last good step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.observers: list[Watcher] = []
        self.regularizers: list[tuple[Regularizer, list[Group]]] = []
        self.after: list[Watcher] = []
        self.measure = False
        self.seen = 0
        self.forward: list[tuple[float | Tensor, Tensor]] = []
        self.largest_ratio: float | None = None
        self.bad = 0
        self.losses, self.bad_losses = 0, torch.zeros(())
        self.told = False
        self.undo: list[Callable[[], None]] = []
        self.restores = False
        self._bad_now: Tensor | None = None
        self.restart()
        self._clear()
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _clear(self) -> None:
        self._taken = 0
        self._R: Tensor | float = 0.0
        self._penalty: Tensor | float = 0.0
        self._norms: Tensor | None = None
        self._forgetting: Tensor | None = None

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._skipped(optimizer):
            return
        for watcher in list(self.observers):
            watcher(optimizer)
        self.regularize(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watcher in list(self.after):
            watcher(optimizer)

    def restart(self) -> None:
        """Training begins here, or nobody follows it any more: what was kept is of another."""
        self._trained: list[Tensor] = []  # by the last good step
        self._kept: list[Tensor] = []  # what they were before it
        self._moved = False

    def release(self) -> None:
        """Nobody goes back any more."""
        self.restores = False
        if self._moved:
            self._kept = []
        self._leave()

    def _leave(self) -> None:
        if not self._followed:
            self.restart()

    @property
    def _followed(self) -> bool:
        return bool(self.restores or self.observers or self.after or self.regularizers)

    def moved(self) -> bool:
        """Whether any step has moved a weight; True if there was no good one."""
        if not self._trained:
            return True
        return anywhere_held(self._trained, self._moved or self._differ())

    def _differ(self) -> bool:
        return not all(map(torch.equal, map(local, self._trained), self._kept))

    def finite(self) -> bool:
        """Whether what the last good step trained is finite now."""
        bad = not all(bool(local(p).isfinite().all()) for p in self._trained)
        return not anywhere_held(self._trained, bad)

    def note_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch of the coming step: one that is not finite skips the step."""
        bad = ~loss.detach().isfinite().all()
        self._bad_now = bad if self._bad_now is None else self._bad_now | bad
        self.losses, self.bad_losses = self.losses + 1, self.bad_losses.to(bad.device) + bad

    def begin(self) -> None:
        """Nothing of a step that mixed precision dropped is left for the coming one."""
        self.forward, self._bad_now = [], None

    @torch.no_grad()
    def _skipped(self, optimizer: Optimizer) -> bool:
        """Whether this step is bad: without gradients an optimizer then leaves all as it is."""
        trained = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.seen += bool(trained)
        parts = [local(p.grad) for p in trained]
        if any(part.numel() for part in parts):
            largest = list(torch._foreach_norm([p for p in parts if p.numel()], torch.inf))
        else:  # a process that holds nothing of any still answers the others
            largest = [part.new_zeros(()) for part in parts[:1]]
        flags = [~t.isfinite() for t in largest] + (
            [] if self._bad_now is None else [self._bad_now]
        )
        self._bad_now = None
        if not flags:
            return False
        # A loss is its process's own.
        bad = bool(anywhere(torch.stack([f.to(flags[0].device) for f in flags]).any()))
        if bad:
            self.bad += 1
            self.forward = []
            for p in trained:
                p.grad = None
        elif trained and self._followed:
            self._keep(trained)
        return bad

    def _keep(self, trained: list[Tensor]) -> None:
        """The weights before a good step: one copy, or none where nobody goes back once a step was
        seen to move them. What is trained may be an embedding of gigabytes."""
        self._moved = self._moved or (bool(self._kept) and self._differ())
        same = [*map(id, self._trained)] == [*map(id, trained)]
        self._trained = trained
        if self._moved and not self.restores:
            self._kept = []
        elif self._kept and same:
            torch._foreach_copy_(self._kept, [*map(local, trained)])
        else:
            self._kept = [local(p.detach()).clone() for p in trained]

    @torch.no_grad()
    def restore(self) -> bool:
        """Back to the weights of the last good step, before it; False if there was none."""
        if not self._kept:
            return False
        torch._foreach_copy_([*map(local, self._trained)], self._kept)
        for undo in list(self.undo):
            undo()
        return True

    def add(self, regularizer: Regularizer, groups: list[Group]) -> None:
        """Regularize from the next step on; the same regularizer is never added twice."""
        self.drop(regularizer)
        self.regularizers.append((regularizer, groups))

    def drop(self, regularizer: Regularizer) -> None:
        """The last one that leaves takes along what was counted."""
        self.regularizers = [(r, g) for r, g in self.regularizers if r is not regularizer]
        if not self.regularizers:
            self._clear()
            self.largest_ratio = None
        self._leave()

    def forget(self, *watchers: Watcher) -> None:
        for watching in (self.observers, self.after):
            watching[:] = [w for w in watching if w not in watchers]
        self._leave()

    @torch.no_grad()
    def regularize(self, optimizer: Optimizer) -> None:
        """Add what all regularizers pull to the gradients."""
        self._taken += bool(self.regularizers)
        self._count(self.forward)
        self.forward = []
        total: dict[tuple[str, ...], tuple[Group, Tensor, Tensor]] = {}
        scale = pending_scale(optimizer)
        for regularizer, groups in self.regularizers:
            pull = None if regularizer.off else regularizer.before_step(groups)
            if pull is None:
                continue
            self._count([(regularizer.phi, pull.R)])
            if (forgetting := regularizer.steer(pull)) is not None:
                self._forgetting = forgetting
            for group, (dB, dA) in zip(groups, limited(pull, groups, scale), strict=True):
                if group.names in total:
                    _, B, A = total[group.names]
                    dB, dA = B + dB, A + dA
                total[group.names] = (group, dB, dA)
        if not total:
            return
        if scale is not None:
            total = {n: (g, B * scale.to(B), A * scale.to(A)) for n, (g, B, A) in total.items()}
        if self.measure:
            task = _norm([g.gradients() for g, _, _ in total.values()])
            self._norms = torch.stack([task, _norm([(B, A) for _, B, A in total.values()])])
        for group, dB, dA in total.values():
            group.add_gradients(dB, dA)

    def _count(self, pulled: list[tuple[float | Tensor, Tensor]]) -> None:
        """φ and R of what was added, for the logs."""
        for phi, R in pulled:
            self._R = self._R + R.detach().double()
            self._penalty = self._penalty + phi * R.detach().double()

    def report(self) -> dict[str, float] | None:
        """Means over the steps since the last report; None if there was none.

        `R` (Eq. 15, before φ), `penalty` (Σ_t φ_t R_t over the steps); where it was measured,
        `penalty_grad_ratio`: the norm of the added gradient over the task's at the last step; and
        `forgetting` there, nats per token, where an importance predicts it.
        """
        if not self._taken:
            return None
        entry = {"R": float(self._R) / self._taken, "penalty": float(self._penalty) / self._taken}
        if self._forgetting is not None:
            entry["forgetting"] = float(self._forgetting)
        if self._norms is not None:
            task, ours = self._norms.tolist()
            if task > 0:
                entry["penalty_grad_ratio"] = ours / task
                self.largest_ratio = max(self.largest_ratio or 0.0, ours / task)
        self._clear()
        return entry


def limited(pull: Pull, groups: list[Group], scale: Tensor | None) -> Gradients:
    """The gradients of a pull with its correction, within the limits that it sets.

    At a step whose task has no gradient, as where all rewards are the same, the limits are those of
    the last one that had: Adam goes on with what it remembers of that, and so does what holds it.

    Args:
        scale: what the task's gradients still carry.
    """
    gradients = pull.gradients
    if pull.correction is None and math.isinf(pull.most):
        return gradients
    task = _norm([g.gradients() for g in groups])
    task = task if scale is None else task / scale.to(task)
    if pull.last is not None:
        task = torch.where(task > 0, task, pull.last.to(task))
        pull.last.copy_(task)
    if pull.correction is not None:
        correction = _within(pull.correction, task)
        gradients = [
            (dB + B, dA + A) for (dB, dA), (B, A) in zip(gradients, correction, strict=True)
        ]
    return gradients if math.isinf(pull.most) else _within(gradients, pull.most * task)


def _within(pairs: Gradients, most: Tensor) -> Gradients:
    """Scaled down where their norm is above `most`; nothing where it is not finite."""
    norm = _norm(pairs)
    share = (most / norm.clamp(min=torch.finfo(most.dtype).tiny)).clamp(max=1)

    def scaled(t: Tensor) -> Tensor:
        return torch.where(norm.isfinite().to(t.device), share.to(t) * t, 0)

    return [(scaled(B), scaled(A)) for B, A in pairs]


def _norm(pairs: Gradients) -> Tensor:
    """Over all of them, a float64 scalar."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for both in pairs for t in both]
    return torch.stack([n.to(norms[0].device) for n in norms]).norm()


_STEPS: WeakKeyDictionary[Optimizer, Steps] = WeakKeyDictionary()


def steps_of(optimizer: Any) -> Steps:
    """The steps of the torch optimizer inside accelerate's wrapper."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if optimizer not in _STEPS:
        _STEPS[optimizer] = Steps(optimizer)
    return _STEPS[optimizer]


def pending_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor that gradients still carry: torch's GradScaler leaves it to fused optimizers."""
    return getattr(optimizer, "grad_scale", None)
