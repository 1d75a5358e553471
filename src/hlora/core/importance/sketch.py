"""The gradients of N sequences themselves, all layers together: a meter of forgetting.

R = ½ mean_n (Σ_l ⟨g_nl, D_l⟩)²/T nats per token. As layers and tokens are not taken apart, it
predicts the KL divergence from the base model that a training really leads to. But a training that
is pulled by N sequences soon leaves their directions, and what they then say of it is too little
(measured on SmolLM2: 0.05 where it was 0.13). So half of the sequences pull and the others, which
never do, are the meter.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hlora.core import linearcodes
from hlora.core.importance import Changes, Groups, Pulled, Tensors
from hlora.core.importance.projected import Projected
from hlora.core.importance.sequences import Sequences
from hlora.core.pairs import Group


class Sketch(Sequences):
    """By layer: V, and g V of each sequence for its first columns."""

    kind = "sketch"
    parts = ("V", "V_scale", "cores", "cores_scale")

    @classmethod
    def keep(cls, of: Projected, U: Tensor, V: Tensor) -> dict[str, Tensor]:
        codes, scale = linearcodes.encode(of.cores, (1, 2))
        return {"cores": codes, "cores_scale": scale}

    def arrange(self, groups: Iterable[Group]) -> None:
        self._stacked = {}
        for g in groups:
            cores = self.stack(g, "cores")
            V = self.stack(g, "V")[:, :, : cores.shape[3]]
            self._stacked[g.names] = (V.contiguous(), cores.flatten(2))

    def pulls(self, groups: Groups, changes: Changes, lefts: Tensors, rights: Tensors) -> Pulled:
        seen = self._seen(groups, changes)
        total = _over_layers(seen)
        forgetting = self._mean(total[pulling(len(total)) :])
        total = total / (2 * self._tokens * pulling(len(total)))
        total[pulling(len(total)) :] = 0  # the meter does not pull
        pulled = []
        for group, left, right, of_layer in zip(groups, lefts, rights, seen, strict=True):
            V, cores = self._stacked[group.names]
            a = total.to(of_layer)
            W = (a @ cores).unflatten(1, (group.m, V.shape[2]))
            pulled.append((of_layer @ a, W @ (right @ V).mT, (left.mT @ W) @ V.mT))
        return pulled, forgetting

    def forgetting(self, groups: Groups, changes: Changes) -> Tensor:
        total = _over_layers(self._seen(groups, changes))
        return self._mean(total[pulling(len(total)) :])

    def _mean(self, seen: Tensor) -> Tensor:
        return seen.square().mean() / (2 * self._tokens)

    def coupling(self, groups: Groups, changes: Changes) -> Tensor:
        seen = self._seen(groups, changes)
        by_layer = torch.cat([s[:, pulling(s.shape[1]) :].to(seen[0].device) for s in seen])
        return by_layer @ by_layer.mT / (2 * self._tokens * by_layer.shape[1])

    def _seen(self, groups: Groups, changes: Changes) -> list[Tensor]:
        """⟨g_nl, D_l⟩ of each group, (L, N)."""
        found = []
        for group, D in zip(groups, changes, strict=True):
            V, cores = self._stacked[group.names]
            seen = D.P @ (D.Q @ V)
            found.append((cores @ seen.flatten(1)[:, :, None]).squeeze(2))
        return found

    def norms(self) -> dict[str, float]:
        """‖F_l‖₂ of F_l = E[ggᵀ] over the elements of g."""
        found = {}
        for n in self.names:
            cores = self._cores(n)
            found[n] = float(torch.linalg.matrix_norm(cores @ cores.mT)) / len(cores)
        return found

    def totals(self) -> dict[str, float]:
        return {n: float(self._cores(n).square().sum(1).mean()) for n in self.names}

    def _cores(self, name: str) -> Tensor:
        """(N, m·c)."""
        codes, scale = self._tensors[f"{name}.cores"], self._tensors[f"{name}.cores_scale"]
        return linearcodes.decode(codes, scale).flatten(1)


def pulling(count: int) -> int:
    """How many of so many sequences pull; the others are the meter."""
    return max(1, count // 2)


def _over_layers(seen: list[Tensor]) -> Tensor:
    """Σ_l ⟨g_nl, D_l⟩, (N,)."""
    return torch.stack([s.sum(0).to(seen[0].device) for s in seen]).sum(0)
