"""What the paper leaves open, fixed three ways. A preset is data; a single value overrides it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from hlora.core.estimators import ESTIMATORS
from hlora.core.kinds import KINDS
from hlora.core.layers import LAYER_WEIGHTS
from hlora.errors import InputError, is_number, one_of, refuse_unknown


@dataclass(frozen=True)
class RecordRule:
    """How ω is gathered and consolidated.

    Attributes:
        kind: what is kept, a name in `hlora.core.kinds`.
        estimator: `equivalent` (Eq. 11) or `projected` (see `hlora.core.estimators`).
        scaled: also multiply g̃ by s, as the authors' code does.
        clamp: negative ω become zero at the `end` or after every `step`.
        xi: ξ of Eq. 13.
        xi_relative: ξ is a multiple of the mean of Δ² over all elements.
        every: consolidate at the end of the `phase`, or of each `epoch` and add up.
        max_grad_norm: the gradient clipping threshold, 0 for none; None leaves it to the trainer.
    """

    kind: str = "factored"
    estimator: str = "equivalent"
    scaled: bool = False
    clamp: str = "end"
    xi: float = 1e-3
    xi_relative: bool = False
    every: str = "phase"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        one_of("estimator", self.estimator, ESTIMATORS)
        one_of("clamp", self.clamp, ("end", "step"))
        one_of("every", self.every, ("phase", "epoch"))
        if not (is_number(self.xi) and self.xi > 0):
            raise InputError(f"xi must be a positive number, not {self.xi!r}.")
        if self.max_grad_norm is not None:
            _not_negative("max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True)
class PenaltyRule:
    """How the importance acts.

    Attributes:
        phi: φ of Eq. 16.
        normalize: scale Ω so that the mean of the layer-weighted Ω over all elements is one.
        layer_weights: `softmax`, `normalized` or `uniform` (Eq. 15).
        softmax_scale: multiplies ‖Ω_l‖₂ inside the softmax.
        apart: the softmax runs over each target (q_proj, v_proj) on its own.
    """

    phi: float = 0.01
    normalize: bool = True
    layer_weights: str = "softmax"
    softmax_scale: float = 1.0
    apart: bool = False

    def __post_init__(self) -> None:
        one_of("layer_weights", self.layer_weights, LAYER_WEIGHTS)
        _not_negative("phi", self.phi)
        _not_negative("softmax_scale", self.softmax_scale)


def _not_negative(name: str, value: float) -> None:
    if not (is_number(value) and value >= 0):
        raise InputError(f"{name} must be zero or a positive number, not {value!r}.")


RECORD_PRESETS = {
    "default": RecordRule(),
    # Eq. 11-13 to the letter, one number an element; ξ is "small" there.
    "paper": RecordRule(kind="dense"),
    # season1blue/HLoRA, 2025-11-25.
    "official": RecordRule(
        kind="dense", scaled=True, clamp="step", xi=1e-9, every="epoch", max_grad_norm=0.0
    ),
}

PENALTY_PRESETS = {
    "default": PenaltyRule(),
    # Eq. 14-16 to the letter, φ = e⁻³ as printed.
    "paper": PenaltyRule(phi=math.exp(-3), normalize=False),
    # season1blue/HLoRA, 2025-11-25.
    "official": PenaltyRule(phi=1e-3, normalize=False, softmax_scale=1e-8, apart=True),
}

Rule = TypeVar("Rule", RecordRule, PenaltyRule)


def choose(presets: dict[str, Rule], preset: str | None, **overrides: Any) -> Rule:
    """A preset, with the values that are not None in place of its own."""
    one_of("preset", preset or "default", presets)
    rule = presets[preset or "default"]
    given = {k: v for k, v in overrides.items() if v is not None}
    refuse_unknown(given, [f.name for f in fields(rule)], "Unknown setting")
    return replace(rule, **given)
