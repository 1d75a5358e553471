"""The same operations in Triton: one launch for all matrices of a shape, Ω never beside itself.

No float is added atomically, so results do not depend on the order in which programs run. What
each computes is `reference`'s; the tests compare the two, on a machine without a GPU under
Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlora.logcodes import LogCodes
from hlora.lowrank import LowRank

WIDEST = 256
"""Columns of P, padded to a power of two: beyond, tiles no longer fit a GPU's shared memory."""
WIDE, STAGES = 32, 2
"""Columns of a tile of the penalty, and how many tiles of Ω are on their way at once."""
PARTIAL = 32 << 20
"""Bytes of partial gradients at once: matrices beyond them take another launch."""


def accumulate(omega: Tensor, gradient: LowRank, step: LowRank) -> None:
    """ω ← ω − g̃ ∘ Δθ, in place (Eq. 12): ω is read and written once. See `reference`."""
    L, m, n = gradient.shape
    k1, k2 = gradient.P.shape[2], step.P.shape[2]
    K1, K2 = _padded(k1), _padded(k2)
    tile = side(max(K1, K2))
    _accumulate[(triton.cdiv(m, tile), triton.cdiv(n, tile), L)](
        omega, *_both(gradient), *_both(step), m, n, k1, k2, K1=K1, K2=K2, BM=tile, BN=tile,
    )  # fmt: skip


def weigh(Omega: Tensor | LogCodes, change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_i Ω_i (PQ)_i² of each matrix (Eq. 14), with its gradients. See `reference`.

    One pass: Ω is read once. A program owns a strip of rows, whose gradient by P it finishes; its
    part of the gradient by Q goes to memory of its own, and the parts are added up in a fixed
    order.
    """
    L, m, n = change.shape
    P, Q = _both(change)
    k = P.shape[2]
    dP, dQ = torch.empty_like(P), torch.empty_like(Q)
    K = _padded(k)
    tall = _rows_of_a_strip(K)
    strips = triton.cdiv(m, tall)
    values = torch.empty((L, strips), dtype=torch.float32, device=P.device)
    at_once = min(L, max(1, PARTIAL // (4 * strips * k * n)))
    parts = torch.empty((at_once, strips, k, n), dtype=torch.float32, device=P.device)
    for start in range(0, L, at_once):
        some = slice(start, min(start + at_once, L))
        if isinstance(Omega, LogCodes):
            kept, scale, coded = Omega.codes[some], Omega.scale[some], True
        else:
            kept, scale, coded = Omega[some], values, False  # `scale` is not read
        count = some.stop - some.start
        _weigh[(strips, count)](
            kept, scale, P[some], Q[some], dP[some], parts, values[some], m, n, k, K=K,
            BM=tall, BN=WIDE, CODED=coded, num_warps=warps(tall), num_stages=STAGES,
        )  # fmt: skip
        torch.sum(parts[:count], dim=1, out=dQ[some])
    return values.sum(dim=1), dP, dQ


def _both(change: LowRank) -> tuple[Tensor, Tensor]:
    return change.P.contiguous(), change.Q.contiguous()


def fits(change: LowRank) -> bool:
    """Whether the kernels take so many columns of P."""
    return _padded(change.P.shape[2]) <= WIDEST


def side(K: int) -> int:
    """Of a square tile of ω."""
    return 64 if K <= 128 else 32


def warps(tall: int) -> int:
    return 8 if tall >= 128 else 4


def _rows_of_a_strip(K: int) -> int:
    """As many as shared memory holds, 99 KiB on a small GPU: the fewer strips, the fewer parts."""
    return {16: 256, 32: 128, 64: 128, 128: 64}.get(K, 32)


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
def _weigh(Omega, scale, P, Q, dP, parts, values, m, n, k, K: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, CODED: tl.constexpr):  # fmt: skip
    strip, l = tl.program_id(0), tl.program_id(1)
    strips = tl.num_programs(0)
    rows = strip * BM + tl.arange(0, BM)
    ks = tl.arange(0, K)
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
        part = tl.dot(tl.trans(p), weighed, input_precision="ieee")
        at = parts + ((l * strips + strip) * k + ks)[:, None].to(tl.int64) * n + columns[None, :]
        tl.store(at, 2.0 * part, mask=(ks < k)[:, None] & (columns < n)[None, :])
    at = dP + (l * m + rows)[:, None].to(tl.int64) * k + ks[None, :]
    tl.store(at, 2.0 * pull, mask=(rows < m)[:, None] & (ks < k)[None, :])
    tl.store(values + l * strips + strip, tl.sum(value))
