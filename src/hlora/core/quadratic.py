"""The penalty R = Σ_l w_l Σ_i Ω_i (θ_i − θ_i^ν)² (Eq. 14, 15) as a regularizer, in closed form."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from hlora.core.importance import Importance
from hlora.core.layers import effective_number, layer_weights
from hlora.core.looks import Looks
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group
from hlora.core.presets import PenaltyRule
from hlora.core.regularizer import Pull, Regularizer
from hlora.errors import StoreError

logger = logging.getLogger(__name__)

CONCENTRATED = 0.9
"""Above this share of Eq. 15's weight one layer is the only one held."""

Anchor = dict[tuple[str, ...], tuple[Tensor, Tensor]]
"""B (L, m, r) and A (L, r, n) of θ^ν by the names of a group."""


class Quadratic(Regularizer):
    """Holds θ to an anchor where it matters.

    Its gradients are dB = 2φ c s (Ω∘D) Aᵀ and dA = 2φ c s Bᵀ (Ω∘D), with D = θ − θ^ν and c the
    layer's weight times the normalization: no graph, and no (m, n) matrix outside `ops`.

    Args:
        importance: Ω; moved to the groups' devices.
        groups: all pairs of the model.
        anchor: θ^ν.
        rule: how Ω acts.

    Attributes:
        looks: what corrects the gradients, if anything does.

    Raises:
        StoreError: the importance is zero everywhere.
    """

    def __init__(
        self, importance: Importance, groups: list[Group], anchor: Anchor, rule: PenaltyRule
    ) -> None:
        self.importance, self.anchor, self.rule = importance, anchor, rule
        self.phi: float | Tensor = rule.phi
        self.looks: Looks | None = None
        self._last_task = torch.zeros((), dtype=torch.float64, device=groups[0].device)
        importance.arrange(groups)
        self._coefficients = self._layer_coefficients(groups)

    def change(self, group: Group, B: Tensor, A: Tensor) -> LowRank:
        """D = θ − θ^ν of a group as thin matrices, θ made of B (L, m, r) and A (L, r, n)."""
        return LowRank.moved(*self.anchor[group.names], B, A, group.s)

    def before_step(self, groups: list[Group]) -> Pull:
        """R and its gradients, corrected by a look where it is time for one."""
        pull = self.pull(groups)
        if self.looks is None:
            return pull
        return replace(pull, correction=self.looks.correction(groups, pull.gradients, self.phi))

    def pull(self, groups: list[Group]) -> Pull:
        """R (Eq. 15), layer weights and normalization included, and its gradients."""
        values, gradients = [], []
        lefts, rights = zip(*(g.factors() for g in groups), strict=True)
        changes = [self.change(*of) for of in zip(groups, lefts, rights, strict=True)]
        pulled, forgetting = self.importance.pulls(groups, changes, lefts, rights)
        for g, (R, GA, BG) in zip(groups, pulled, strict=True):
            c = self._coefficients[g.names]
            weight = (2 * self.phi * c).reshape(-1, 1, 1) * g.s
            values.append(c @ R)
            # Nothing is added to what is frozen, so it counts for no norm either.
            gradients.append((weight * GA * g.trains_B, weight * BG * g.trains_A))
        R = torch.stack([v.double().to(values[0].device) for v in values]).sum()
        return Pull(R, gradients, forgetting, last=self._last_task)

    def let_go(self) -> None:
        self.looks, self.anchor, self._coefficients = None, {}, {}

    def state(self) -> dict[str, Tensor]:
        looked = {} if self.looks is None else self.looks.state()
        return {"last_task": self._last_task} | looked

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._last_task.copy_(tensors.get("last_task", self._last_task))
        if self.looks is not None:
            self.looks.load_state(tensors, self.anchor)

    def predict(self, groups: list[Group]) -> Tensor:
        """The forgetting that the importance predicts for θ as it is, nats per token."""
        changes = [self.change(g, *g.factors()) for g in groups]
        return self.importance.forgetting(groups, changes)

    def _layer_coefficients(self, groups: list[Group]) -> dict[tuple[str, ...], Tensor]:
        """What multiplies each R_l: Eq. 15's weight, and the normalization of Ω."""
        names = [n for g in groups for n in g.names]
        by_name = dict.fromkeys(names, 1.0) if self.importance.natural else self._weights(groups)
        return {
            g.names: torch.tensor([by_name[n] for n in g.names], dtype=g.dtype, device=g.device)
            for g in groups
        }

    def _weights(self, groups: list[Group]) -> dict[str, float]:
        """The same by layer, for importance that is not in nats."""
        rule, totals = self.rule, self.importance.totals()
        weights = layer_weights(
            self.importance.norms(), rule.layer_weights, scale=rule.softmax_scale, apart=rule.apart
        )
        top = max(weights, key=weights.__getitem__)
        share = weights[top] / sum(weights.values())
        if len(weights) > 1 and share > CONCENTRATED:
            logger.warning(
                "%s holds %.0f %% of the layer weights (effective number of layers %.1f of %d), so "
                "the others are free to forget: use layer_weights='normalized', or record with a "
                "larger xi.",
                top, 100 * share, effective_number(weights), len(weights),
            )  # fmt: skip
        scale = 1.0
        if rule.normalize:
            mean = sum(weights[n] * totals[n] for n in weights) / self.importance.elements(groups)
            if not mean > 0:
                raise StoreError(
                    "The importance is zero everywhere: the general phase trained nothing. Record "
                    "it again."
                )
            scale = 1.0 / mean
        return {n: scale * w for n, w in weights.items()}
