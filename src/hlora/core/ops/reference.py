"""Plain torch, tiled over rows so that no (m, n) temporary exceeds one tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hlora.core.logcodes import LogCodes
from hlora.core.lowrank import LowRank, Weighed

TILE = 1 << 20
"""Elements of a temporary. 4 MiB in float32: it stays in a CPU's cache."""


def tiles(shape: tuple[int, int, int]) -> Iterator[tuple[int, slice]]:
    """(matrix, rows) pairs that cover a batch of shape (L, m, n)."""
    L, m, n = shape
    rows = max(1, TILE // max(n, 1))
    for l in range(L):
        for start in range(0, m, rows):
            yield l, slice(start, min(start + rows, m))


def accumulate(omega: Tensor, gradient: LowRank, step: LowRank) -> None:
    """ω ← ω − g̃ ∘ Δθ, in place (Eq. 12).

    Args:
        omega: (L, m, n), the running path integral.
        gradient: g̃ (Eq. 11), or another estimate of the gradient with respect to θ.
        step: Δθ of one optimizer step (Eq. 10).
    """
    for l, rows in tiles(gradient.shape):
        g = gradient.P[l, rows] @ gradient.Q[l]
        d = step.P[l, rows] @ step.Q[l]
        omega[l, rows].addcmul_(g.to(omega.dtype), d.to(omega.dtype), value=-1.0)


def consolidate(omega: Tensor, delta: LowRank, xi: Tensor) -> Tensor:
    """ω ← max(ω, 0) / (Δ² + ξ), in place (Eq. 13).

    Negative ω, which AdamW makes possible, would reward forgetting, so it counts as zero.

    Args:
        omega: (L, m, n), becomes Ω.
        delta: Δ, how far θ moved during the phase.
        xi: ξ > 0, a scalar tensor.

    Returns:
        How many elements of ω were negative, a scalar tensor.
    """
    negative = torch.zeros((), dtype=torch.int64, device=omega.device)
    for l, rows in tiles(delta.shape):
        d = delta.P[l, rows] @ delta.Q[l]
        tile = omega[l, rows]
        negative += (tile < 0).sum()
        tile.clamp_(min=0).div_(d.square_().add_(xi).to(omega.dtype))
    return negative


def consolidate_rank_one(
    rows: Tensor, columns: Tensor, delta: LowRank, xi: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column sums of ω/(Δ² + ξ) for the rank-one ω that has the given sums (Eq. 13).

    Args:
        rows: (L, m) row sums of ω, not negative.
        columns: (L, n) its column sums.
        delta: Δ, how far θ moved during the phase.
        xi: ξ > 0, a scalar tensor.

    Returns:
        (L, m) and (L, n). No (m, n) tensor beyond a tile is formed.
    """
    # Where negative sums were set to zero the two totals differ: their geometric mean.
    total = (rows.sum(dim=1) * columns.sum(dim=1)).sqrt()
    left = rows / total.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]
    new_rows, new_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for l, part in tiles(delta.shape):
        tile = delta.P[l, part] @ delta.Q[l]
        tile = (left[l, part, None] * columns[l]).div_(tile.square_().add_(xi))
        new_rows[l, part] = tile.sum(dim=1)
        new_columns[l] += tile.sum(dim=0)
    return new_rows, new_columns


def add_squared_gradients(total: Tensor, delta: Tensor, x: Tensor) -> None:
    """total ← total + Σ_b (Σ_t δ_bt x_btᵀ)², in place: the squared gradient of each sequence.

    Args:
        total: (m, n).
        delta: δ (b, T, m), the gradient of the layer's output.
        x: (b, T, n), its input.
    """
    delta, x = delta.to(total.dtype), x.to(total.dtype)
    m, n = total.shape
    step = max(1, TILE // max(n * len(x), 1))
    for start in range(0, m, step):  # all sequences at once, some rows at a time
        rows = slice(start, min(start + step, m))
        total[rows] += (delta[:, :, rows].mT @ x).square_().sum(dim=0)


def weigh(Omega: Tensor | LogCodes, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
    """The change D weighed by Ω (Eq. 14).

    Args:
        Omega: (L, m, n), in any float type or as 8-bit codes; it is read tile by tile.
        change: D = P Q.
        left: (L, m, r).
        right: (L, r, n).
    """
    P, Q = change.P, change.Q
    values = P.new_zeros(P.shape[0])
    by_right = torch.empty_like(left, memory_format=torch.contiguous_format)
    by_left = torch.zeros_like(right, memory_format=torch.contiguous_format)
    for l, rows in tiles(change.shape):
        d = P[l, rows] @ Q[l]
        pull = d * Omega[l, rows].to(d.dtype)  # codes are decoded by the same two calls
        values[l] += (pull * d).sum()
        torch.mm(pull, right[l].mT, out=by_right[l, rows])
        by_left[l].addmm_(left[l, rows].mT, pull)
    return values, by_right, by_left
