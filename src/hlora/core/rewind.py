"""Taking back a part of a finished change: one scale for each matrix, for a budget of forgetting.

With D = Σ_l α_l D_l the predicted forgetting is αᵀQα, and what scaling costs the domain is taken
for (1−α)ᵀK(1−α). The cheapest α for a budget is (K + λQ)⁻¹K1, with the λ that meets it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scales(Q: Tensor, K: Tensor, share: float) -> Tensor:
    """α (L,) between 0 and 1 that keeps (1−α)ᵀK(1−α) least at αᵀQα = share² · 1ᵀQ1.

    Args:
        Q: (L, L), forgetting; positive semidefinite.
        K: (L, L), cost for the domain; positive definite.
        share: 1 takes nothing back; every matrix scaled by it would forget as much.
    """
    Q, K = Q.double(), K.double()
    all_of = torch.ones(len(Q), dtype=Q.dtype, device=Q.device)
    wanted = share**2 * float(all_of @ Q @ all_of)
    if share >= 1 or not wanted > 0:
        return all_of if share >= 1 else share * all_of
    unit = float(K.diagonal().sum() / Q.diagonal().sum())
    low, high = -20.0, 60.0  # log λ
    for _ in range(80):
        middle = (low + high) / 2
        found = _solve(Q, K, unit * float(torch.tensor(middle).exp()))
        if float(found @ Q @ found) > wanted:
            low = middle
        else:
            high = middle
    return _solve(Q, K, unit * float(torch.tensor(high).exp()))


def _solve(Q: Tensor, K: Tensor, strength: float) -> Tensor:
    return torch.linalg.solve(K + strength * Q, K.sum(1)).clamp(0, 1)


def costs(sizes: Tensor, gradients: Tensor | None = None) -> Tensor:
    """K from what is known of the domain.

    Args:
        sizes: (L,), ‖D_l‖².
        gradients: (N, L), ⟨g_nl, D_l⟩ of N rows of the domain at the trained weights, if there
            are any: K is then their second moment, with a tenth of its trace spread by size.
    """
    spread = sizes.double().clamp(min=1e-12 * float(sizes.max()))
    if gradients is None:
        return torch.diag(spread)
    moment = gradients.double().mT @ gradients.double() / len(gradients)
    return moment + torch.diag(spread * (0.1 * moment.trace() / spread.sum()))
