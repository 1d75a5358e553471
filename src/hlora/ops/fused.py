"""The same operations in Triton: one launch for all matrices of a shape, Ω never beside itself.

No float is added atomically, so results do not depend on the order in which programs run. What
each computes is `reference`'s; the tests compare the two, on a machine without a GPU under
Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlora.logcodes import LogCodes
from hlora.lowrank import LowRank

ROWS, COLUMNS = 64, 64
"""A tile. `tl.dot` wants at least 16 of each."""


def accumulate(omega: Tensor, gradient: LowRank, step: LowRank) -> None:
    """ω ← ω − g̃ ∘ Δθ, in place (Eq. 12): ω is read and written once. See `reference`."""
    L, m, n = gradient.shape
    k1, k2 = gradient.P.shape[2], step.P.shape[2]
    _accumulate[(triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS), L)](
        omega, *_both(gradient), *_both(step), m, n, k1, k2,
        K1=_padded(k1), K2=_padded(k2), BM=ROWS, BN=COLUMNS,
    )  # fmt: skip


def weigh(Omega: Tensor | LogCodes, change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_i Ω_i (PQ)_i² of each matrix (Eq. 14), with its gradients. See `reference`.

    Two launches, one over strips of rows (the value and the gradient by P), one over strips of
    columns (by Q): Ω is read twice, which costs less memory than partial sums and is
    deterministic.
    """
    L, m, n = change.shape
    P, Q = _both(change)
    k = P.shape[2]
    dP, dQ = torch.empty_like(P), torch.empty_like(Q)
    strips = triton.cdiv(m, ROWS)
    partial = torch.empty((L, strips), dtype=torch.float32, device=P.device)
    if isinstance(Omega, LogCodes):
        kept, scale, coded = Omega.codes, Omega.scale, True
    else:
        kept, scale, coded = Omega, partial, False  # `scale` is not read
    shape: dict[str, Any] = {"K": _padded(k), "BM": ROWS, "BN": COLUMNS, "CODED": coded}
    _weigh_rows[(strips, L)](kept, scale, P, Q, dP, partial, m, n, k, **shape)
    _weigh_columns[(triton.cdiv(n, COLUMNS), L)](kept, scale, P, Q, dQ, m, n, k, **shape)
    return partial.sum(dim=1), dP, dQ


def _both(change: LowRank) -> tuple[Tensor, Tensor]:
    return change.P.contiguous(), change.Q.contiguous()


def _padded(k: int) -> int:
    return max(16, triton.next_power_of_2(k))


@triton.jit
def _left(P, l, rows, m, k, K: tl.constexpr):
    """A strip of P (L, m, k): (BM, K), zero beyond."""
    ks = tl.arange(0, K)
    at = P + (l * m + rows)[:, None].to(tl.int64) * k + ks[None, :]
    return tl.load(at, mask=(rows < m)[:, None] & (ks < k)[None, :], other=0.0)


@triton.jit
def _right(Q, l, columns, n, k, K: tl.constexpr):
    """A strip of Q (L, k, n): (K, BN), zero beyond."""
    ks = tl.arange(0, K)
    at = Q + (l * k + ks)[:, None].to(tl.int64) * n + columns[None, :]
    return tl.load(at, mask=(ks < k)[:, None] & (columns < n)[None, :], other=0.0)


@triton.jit
def _kept(Omega, scale, l, rows, columns, m, n, CODED: tl.constexpr):
    """A tile of Ω (BM, BN) as float32, decoded where it is coded; zero beyond."""
    row = (l * m + rows).to(tl.int64)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    values = tl.load(Omega + row[:, None] * n + columns[None, :], mask=inside, other=0)
    if CODED:
        low = tl.load(scale + 2 * row, mask=rows < m, other=0.0)
        step = tl.load(scale + 2 * row + 1, mask=rows < m, other=0.0)
        decoded = tl.exp2(low[:, None] + (values.to(tl.float32) - 1.0) * step[:, None])
        return tl.where(values > 0, decoded, 0.0)
    return values.to(tl.float32)


@triton.jit
def _accumulate(omega, gP, gQ, dP, dQ, m, n, k1, k2, K1: tl.constexpr, K2: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    l = tl.program_id(2)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.dot(_left(gP, l, rows, m, k1, K1), _right(gQ, l, columns, n, k1, K1),
               input_precision="ieee")  # fmt: skip
    d = tl.dot(_left(dP, l, rows, m, k2, K2), _right(dQ, l, columns, n, k2, K2),
               input_precision="ieee")  # fmt: skip
    at = omega + (l * m + rows)[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) - g * d, mask=inside)


@triton.jit
def _weigh_rows(Omega, scale, P, Q, dP, partial, m, n, k, K: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, CODED: tl.constexpr):  # fmt: skip
    strip, l = tl.program_id(0), tl.program_id(1)
    rows = strip * BM + tl.arange(0, BM)
    p = _left(P, l, rows, m, k, K)
    pull = tl.zeros((BM, K), dtype=tl.float32)
    value = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, n, BN):
        columns = start + tl.arange(0, BN)
        q = _right(Q, l, columns, n, k, K)
        d = tl.dot(p, q, input_precision="ieee")
        weighed = d * _kept(Omega, scale, l, rows, columns, m, n, CODED)
        value += tl.sum(weighed * d, axis=1)
        pull += tl.dot(weighed, tl.trans(q), input_precision="ieee")
    ks = tl.arange(0, K)
    at = dP + (l * m + rows)[:, None].to(tl.int64) * k + ks[None, :]
    tl.store(at, 2.0 * pull, mask=(rows < m)[:, None] & (ks < k)[None, :])
    tl.store(partial + l * tl.num_programs(0) + strip, tl.sum(value))


@triton.jit
def _weigh_columns(Omega, scale, P, Q, dQ, m, n, k, K: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, CODED: tl.constexpr):  # fmt: skip
    strip, l = tl.program_id(0), tl.program_id(1)
    columns = strip * BN + tl.arange(0, BN)
    q = _right(Q, l, columns, n, k, K)
    pull = tl.zeros((K, BN), dtype=tl.float32)
    for start in range(0, m, BM):
        rows = start + tl.arange(0, BM)
        p = _left(P, l, rows, m, k, K)
        d = tl.dot(p, q, input_precision="ieee")
        weighed = d * _kept(Omega, scale, l, rows, columns, m, n, CODED)
        pull += tl.dot(tl.trans(p), weighed, input_precision="ieee")
    ks = tl.arange(0, K)
    at = dQ + (l * k + ks)[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(at, 2.0 * pull, mask=(ks < k)[:, None] & (columns < n)[None, :])
