"""Estimates of the gradient with respect to θ from the gradients of B and A.

Each takes B (L, m, r), A (L, r, n), their gradients g^B and g^A, s (L, 1, 1), the learning rate η,
one number or (L, 1, 1), and which factors are trained, and returns a `LowRank`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hlora.core.lowrank import LowRank


def equivalent(
    B: Tensor, A: Tensor, gB: Tensor, gA: Tensor, s: Tensor, eta: float | Tensor, **_: bool
) -> LowRank:
    """g̃ = g^B A + B g^A − η g^B g^A (Eq. 11): under plain SGD exactly −Δθ/(ηs)."""
    return LowRank(torch.cat([gB, B - eta * gB], dim=2), torch.cat([A, gA], dim=1))


def projected(
    B: Tensor, A: Tensor, gB: Tensor, gA: Tensor, s: Tensor, eta: float | Tensor, *,
    trains_A: bool = True, trains_B: bool = True,
) -> LowRank:  # fmt: skip
    """The true gradient projected on the directions in which B and A can move θ.

    P_T G = [g^B (AAᵀ)⁺A + B(BᵀB)⁺g^A − B(BᵀB)⁺(Bᵀg^B)(AAᵀ)⁺A] / s. Unlike Eq. 11 it makes
    Eq. 3 hold to first order, for any optimizer: Σω is the loss drop. Not in the paper.

    With one factor frozen only the other's directions exist. On a GPU the pseudo-inverse of the
    r × r matrices makes the host wait for the device at each step.
    """
    gB_A = gB @ _pinv(A @ A.mT)  # (L, m, r), to be multiplied by A
    B_inv = B @ _pinv(B.mT @ B)
    if not trains_A:
        return LowRank(gB_A / s, A)
    if not trains_B:
        return LowRank(B_inv / s, gA)
    left = gB_A - B_inv @ (B.mT @ gB_A)
    return LowRank(torch.cat([left, B_inv], dim=2) / s, torch.cat([A, gA], dim=1))


def _pinv(gram: Tensor) -> Tensor:
    """Pseudo-inverse of symmetric (L, r, r) matrices, in float64: B starts at zero."""
    return torch.linalg.pinv(gram.double(), hermitian=True, rtol=1e-10).to(gram.dtype)


ESTIMATORS = {"equivalent": equivalent, "projected": projected}
