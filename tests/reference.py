"""The paper's equations on dense matrices in float64, element by element: the tests' oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_gradients(model, pairs, rows) -> dict[str, Tensor]:
    """∂ log p(row) / ∂θ of each target by name, (N, m, n): one backward pass a row of (N, T)."""
    found: dict[str, list[Tensor]] = {p.name: [] for p in pairs}
    for p in pairs:
        p.weight.requires_grad_(True)
    for row in rows:
        logits = model(input_ids=row[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, row[1:], reduction="sum")
        for p, g in zip(pairs, torch.autograd.grad(loss, [p.weight for p in pairs]), strict=True):
            found[p.name].append(g.mT if p.transposed else g)
    return {name: torch.stack(of) for name, of in found.items()}


def equivalent_gradient(B, A, gB, gA, eta) -> Tensor:
    """Eq. 11, for (L, m, r) and (L, r, n)."""
    return gB @ A + B @ gA - eta * gB @ gA


def path_integral_step(omega, gradient, B0, A0, B1, A1, s) -> Tensor:
    """Eq. 12."""
    return omega - gradient * (s * (B1 @ A1 - B0 @ A0))


def consolidated(omega, delta, xi) -> Tensor:
    """Eq. 13."""
    return omega.clamp(min=0) / (delta**2 + xi)


def penalty(Omega: list[Tensor], change: list[Tensor], weights: list[float]) -> Tensor:
    """Eq. 14 and 15."""
    return sum(w * (o * d**2).sum() for w, o, d in zip(weights, Omega, change, strict=True))


def projected_gradient(G, B, A) -> Tensor:
    """G on the tangent space {dB A + B dA}: P_B G + G P_A − P_B G P_A, by projectors."""
    P_A = torch.linalg.pinv(A) @ A
    P_B = B @ torch.linalg.pinv(B)
    return P_B @ G + G @ P_A - P_B @ G @ P_A
