"""Records how much each element of θ matters while a LoRA adapter trains (Eq. 2-13)."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hlora.core.estimators import ESTIMATORS
from hlora.core.importance import Importance, Trace
from hlora.core.kinds import kind_named
from hlora.core.layers import effective_number, layer_weights
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group, unstack
from hlora.core.presets import RecordRule
from hlora.core.statefile import pack, read
from hlora.core.steps import Steps, pending_scale
from hlora.errors import InputError


class Recorder:
    """One recording, from its first optimizer step to its importance.

    Gradients are taken as the optimizer receives them, before any regularizer adds to them.

    Args:
        groups: all pairs of the model.
        rule: what is kept, and how.
        earlier: the importance of an earlier general task, which this one adds to.
        max_grad_norm: the clipping threshold, to count the clipped steps; 0 for none.
    """

    def __init__(
        self,
        groups: list[Group],
        rule: RecordRule,
        *,
        earlier: Importance | None = None,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.groups, self.rule, self.max_grad_norm = groups, rule, max_grad_norm
        self._trace = kind_named(rule.kind).trace(groups, earlier)
        # Taken just before the first step: a penalty may still put ν's weights in.
        self._start: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._before: dict[tuple[str, ...], tuple[LowRank, Tensor, Tensor]] = {}
        # The last step, until the next one shows that it led to weights with a finite loss.
        self._held: list[tuple[Group, LowRank, LowRank]] = []
        self._counts = {
            k: torch.zeros((), dtype=torch.float64, device=groups[0].device)
            for k in ("negative", "clipped", "omega", "recorded")
        }
        self._consolidations = 0
        self._pending = 0
        self._seconds, self._began = 0.0, time.monotonic()

    def attach(self, steps: Steps) -> None:
        """Record the steps of an optimizer from now on."""
        steps.observers.append(self.take_gradients)
        steps.after.append(self.take_step)
        steps.undo.append(self._held.clear)

    def detach(self, steps: Steps) -> None:
        steps.forget(self.take_gradients, self.take_step)
        steps.undo = [u for u in steps.undo if u != self._held.clear]

    @torch.no_grad()
    def take_gradients(self, optimizer: Optimizer) -> None:
        """Before a step: g̃ (Eq. 11), B and A."""
        self._settle()
        scale = pending_scale(optimizer)
        squares = torch.zeros_like(self._counts["clipped"])
        rates = learning_rates(optimizer)
        for g in self.groups:
            (B, A), (gB, gA) = g.factors(), g.gradients()
            self._start.setdefault(g.names, (B, A))
            if scale is not None:
                gB, gA = gB / scale.to(gB), gA / scale.to(gA)
            if self.max_grad_norm > 0:
                squares += (gB.square().sum() + gA.square().sum()).to(squares)
            gradient = ESTIMATORS[self.rule.estimator](
                B, A, gB, gA, g.s, _eta(g, rates), trains_A=g.trains_A, trains_B=g.trains_B
            )
            if self.rule.scaled:
                gradient = LowRank(g.s * gradient.P, gradient.Q)
            self._before[g.names] = (gradient, B, A)
        if self.max_grad_norm > 0:
            self._counts["clipped"] += squares.sqrt() >= 0.999 * self.max_grad_norm

    @torch.no_grad()
    def take_step(self, optimizer: Optimizer) -> None:
        """After it: Δθ (Eq. 10)."""
        if not self._before:  # a skipped step, or attached in the middle of one
            return
        for g in self.groups:
            gradient, B0, A0 = self._before.pop(g.names)
            self._held.append((g, gradient, LowRank.moved(B0, A0, *g.factors(), g.s)))

    @torch.no_grad()
    def _settle(self) -> None:
        """ω of the last step (Eq. 12)."""
        if not self._held:
            return
        for g, gradient, step in self._held:
            self._trace.add(g, gradient, step, clamp=self.rule.clamp == "step")
        self._held.clear()
        self._counts["recorded"] += 1
        self._pending += 1

    @property
    def trace(self) -> Trace:
        """ω and Ω, the last step included."""
        self._settle()
        return self._trace

    @torch.no_grad()
    def consolidate(self, *, last: bool = False) -> None:
        """Add ω/(Δ² + ξ) to Ω and reset ω (Eq. 13)."""
        deltas = {
            g.names: LowRank.moved(*self._start.get(g.names, g.factors()), *g.factors(), g.s)
            for g in self.groups
        }
        xi = torch.tensor(self.rule.xi, dtype=torch.float64)
        if self.rule.xi_relative:
            squares = sum(float(d.sum_of_squares().double().sum()) for d in deltas.values())
            xi = xi * squares / self._elements()
            if not xi > 0:
                raise InputError("xi is relative to how far θ moved, and it did not move at all.")
        for g in self.groups:
            self._counts["omega"] += self.trace.total(g).to(self._counts["omega"])
            self._counts["negative"] += self.trace.consolidate(
                g, deltas[g.names], xi.to(g.device, g.dtype), last=last
            ).to(self._counts["negative"])
        self._consolidations += 1
        self._pending = 0

    @property
    def pending(self) -> int:
        """Steps since the last consolidation."""
        return self._pending + bool(self._held)

    def collect(self) -> tuple[Importance, dict[str, Any]]:
        """Ω and a summary of it, at the end. Every process calls it."""
        if self.pending or self._consolidations == 0:
            self.consolidate(last=True)
        importance = self.trace.importance()
        recorded = int(self._counts["recorded"])
        negative = float(self._counts["negative"]) / self._elements() / self._consolidations
        return importance, {
            "steps": recorded,
            "seconds": round(self._elapsed(), 1),
            "clipped_share": float(self._counts["clipped"]) / max(recorded, 1),
            "path_integral": float(self._counts["omega"]),
            # Where every step was clamped none is left to count.
            "negative_share": None if self.rule.clamp == "step" else negative,
            **summarize_norms(importance.norms()),
        }

    def _elapsed(self) -> float:
        """Seconds of training recorded so far, those before a resume included."""
        return self._seconds + time.monotonic() - self._began

    def _elements(self) -> int:
        return sum(len(g.names) * g.m * g.n for g in self.groups)

    # ---------------------------------------------------------------- checkpoints

    def state(self, weights: str) -> bytes:
        """Everything that a resumed recording needs, as a safetensors file.

        Args:
            weights: `digest` of the groups.
        """
        tensors = dict(self.trace.state())
        for names, both in self._start.items():
            tensors |= unstack(names, both, ("B0.{}", "A0.{}"))
        notes = {
            **{k: float(v) for k, v in self._counts.items()},
            "consolidations": self._consolidations,
            "pending": self._pending,
            "seconds": self._elapsed(),
            "rule": asdict(self.rule),
            "weights": weights,
        }
        return pack(tensors, notes)

    def load_state(self, path: Path) -> dict[str, Any]:
        """Go on from what `state` gave; returns its notes.

        Raises:
            StoreError: the file is missing or damaged.
            InputError: it was recorded with other settings.
        """
        tensors, notes = read(path, "recording")
        now = asdict(self.rule)
        if notes["rule"] != {k: now[k] for k in notes["rule"] if k in now}:
            raise InputError(
                f"Cannot resume the recording: {path} was written with {notes['rule']} and "
                f"this run has {now}."
            )
        self.trace.load_state(self.groups, tensors)
        self._consolidations, self._pending = notes["consolidations"], notes["pending"]
        self._seconds = notes["seconds"]
        for k, count in self._counts.items():
            count.fill_(notes[k])
        for g in self.groups:
            self._start[g.names] = (g.stack(tensors, "B0.{}"), g.stack(tensors, "A0.{}"))
        return notes


def learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """η of the step to come by the parameter's id."""
    return {id(p): float(s["lr"]) for s in optimizer.param_groups for p in s["params"]}


def _eta(group: Group, rates: dict[int, float]) -> float | Tensor:
    """η of each pair, (L, 1, 1), or one number; B's where A has another (LoRA+)."""
    found = [rates[id(p.B if group.trains_B else p.A)] for p in group.pairs for _ in p.names]
    if len(set(found)) == 1:
        return found[0]
    return torch.tensor(found, dtype=group.dtype, device=group.device).reshape(-1, 1, 1)


def summarize_norms(norms: dict[str, float]) -> dict[str, Any]:
    """The largest and smallest ‖Ω_l‖₂, and the effective number of layers under Eq. 15."""
    largest, smallest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    return {
        "largest_norm": {"layer": largest, "value": norms[largest]},
        "smallest_norm": {"layer": smallest, "value": norms[smallest]},
        "layers": len(norms),
        "effective_layers": effective_number(layer_weights(norms)),
    }


def describe_summary(kind: str, summary: dict[str, Any]) -> str:
    """The summary in a few lines for people."""
    lines = [
        *kind_named(kind).describe(summary),
        *(
            f"{word} ‖Ω_l‖₂: {summary[key]['value']:.4g} ({summary[key]['layer']})"
            for word, key in (("largest", "largest_norm"), ("smallest", "smallest_norm"))
        ),
    ]
    if not kind_named(kind).natural:
        lines.append(
            f"effective number of layers under the softmax of Eq. 15: "
            f"{summary['effective_layers']:.1f} of {summary['layers']}"
        )
    if summary.get("clipped_share", 0) > 0:
        lines.append(
            f"gradients were clipped in {summary['clipped_share']:.0%} of the steps, whose ω is "
            "smaller by the clipping factor (max_grad_norm=0 avoids it)"
        )
    return "\n".join(lines)
