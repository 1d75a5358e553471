"""The same operations in Triton: one launch for all matrices of a shape, Ω never beside itself.

No float is added atomically, so results do not depend on the order in which programs run. What
each computes is `reference`'s; the tests compare the two, on a machine without a GPU under
Triton's interpreter. `python -m benchmarks.kernels` compiles them for a GPU that need not be there
and prints the registers and the memory that each takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlora.core.logcodes import LogCodes
from hlora.core.lowrank import LowRank, Weighed

CHUNK = 16
"""Columns of P at a time: a longer product, unrolled, would spill registers."""
BLOCK = 512
"""Rows and columns of Ω that one program of `weigh` goes through, tile by tile."""
COMPILED = {"num_stages": 2, "enable_fp_fusion": True}
"""Two tiles of Ω on their way at once; products and sums in one instruction."""
PARTIAL = 32 << 20
"""Bytes of partial gradients at once: matrices beyond them take another launch."""
SIDE = 64
"""Of a tile of `accumulate`."""


def accumulate(omega: Tensor, gradient: LowRank, step: LowRank) -> None:
    """ω ← ω − g̃ ∘ Δθ, in place (Eq. 12): ω is read and written once. See `reference`."""
    L, m, n = gradient.shape
    k1, k2 = gradient.P.shape[2], step.P.shape[2]
    _accumulate[(triton.cdiv(m, SIDE), triton.cdiv(n, SIDE), L)](
        omega, *_both(gradient), *_both(step), m, n, k1, k2, **square(),
    )  # fmt: skip


def weigh(Omega: Tensor | LogCodes, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
    """The change weighed by Ω (Eq. 14). See `reference`.

    One pass: Ω is read once. A program owns a block of Ω; its parts of the two results go to
    memory of its own, and the parts are added up in a fixed order.
    """
    L, m, n = change.shape
    P, Q = _both(change)
    left, right = left.contiguous(), right.contiguous()
    k, r = P.shape[2], left.shape[2]
    tall, wide = triton.cdiv(m, BLOCK), triton.cdiv(n, BLOCK)
    at_once = min(L, max(1, PARTIAL // (4 * r * (tall * n + wide * m))))
    by_left = P.new_empty((at_once, tall, r, n))
    by_right = P.new_empty((at_once, wide, m, r))
    values = P.new_empty((L, tall * wide))
    dB, dA = torch.empty_like(left), torch.empty_like(right)
    for start in range(0, L, at_once):
        some = slice(start, min(start + at_once, L))
        count = some.stop - some.start
        if isinstance(Omega, LogCodes):
            kept, scale, coded = Omega.codes[some], Omega.scale[some], True
        else:
            kept, scale, coded = Omega[some], values, False  # `scale` is not read
        _weigh[(tall, wide, count)](
            kept, scale, P[some], Q[some], left[some], right[some], by_left, by_right,
            values[some], m, n, k, r, **tiles(k, r, coded),
        )  # fmt: skip
        torch.sum(by_right[:count], dim=1, out=dB[some])
        torch.sum(by_left[:count], dim=1, out=dA[some])
    return values.sum(dim=1), dB, dA


def square() -> dict[str, int]:
    """The sizes of `_accumulate`."""
    return {"KC": CHUNK, "BM": SIDE, "BN": SIDE, "num_warps": 4, **COMPILED}


def tiles(k: int, r: int, coded: bool) -> dict[str, int]:
    """The sizes of `_weigh`, the largest tile whose sums stay in registers (benchmarks.kernels)."""
    R = max(8, triton.next_power_of_2(r))
    BM, warps = {8: (64, 4), 16: (64, 4), 32: (64, 8)}.get(R, (16 if coded else 32, 8))
    return {
        "KC": CHUNK, "R": R, "BM": BM, "BN": 64, "H": BLOCK, "ONE": k <= CHUNK, "CODED": coded,
        "num_warps": warps, **COMPILED,
    }  # fmt: skip


def _both(change: LowRank) -> tuple[Tensor, Tensor]:
    return change.P.contiguous(), change.Q.contiguous()


@triton.jit
def _tile(T, first, rows, columns, height, width):
    """T[first + rows, columns] of a contiguous (…, height, width), zero beyond."""
    at = T + (first + rows)[:, None].to(tl.int64) * width + columns[None, :]
    return tl.load(at, mask=(rows < height)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _product(P, Q, l, rows, columns, m, n, k, KC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of PQ (BM, BN), zero beyond."""
    d = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, k, KC):
        ks = first + tl.arange(0, KC)
        p, q = _tile(P, l * m, rows, ks, m, k), _tile(Q, l * k, ks, columns, k, n)
        d = tl.dot(p, q, d, input_precision="ieee")
    return d


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
def _accumulate(omega, gP, gQ, dP, dQ, m, n, k1, k2, KC: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr):  # fmt: skip
    l = tl.program_id(2)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    g = _product(gP, gQ, l, rows, columns, m, n, k1, KC, BM, BN)
    d = _product(dP, dQ, l, rows, columns, m, n, k2, KC, BM, BN)
    at = omega + (l * m + rows)[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) - g * d, mask=inside)


@triton.jit
def _weigh(Omega, scale, P, Q, X, Y, by_x, by_y, values, m, n, k, r, KC: tl.constexpr,
           R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
           ONE: tl.constexpr, CODED: tl.constexpr):  # fmt: skip
    down, right, l = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tall, wide = tl.num_programs(0), tl.num_programs(1)
    ks, rs = tl.arange(0, KC), tl.arange(0, R)
    value = tl.zeros((BM,), dtype=tl.float32)
    for top in range(down * H, min(m, (down + 1) * H), BM):
        rows = top + tl.arange(0, BM)
        x = _tile(X, l * m, rows, rs, m, r)
        if ONE:  # then no loop stands within that over columns, and Triton loads ahead in it
            p = _tile(P, l * m, rows, ks, m, k)
        pull = tl.zeros((BM, R), dtype=tl.float32)
        for left in range(right * H, min(n, (right + 1) * H), BN):
            columns = left + tl.arange(0, BN)
            if ONE:
                q = _tile(Q, l * k, ks, columns, k, n)
                d = tl.dot(p, q, input_precision="ieee")
            else:
                d = _product(P, Q, l, rows, columns, m, n, k, KC, BM, BN)
            weighed = d * _kept(Omega, scale, l, rows, columns, m, n, CODED)
            value += tl.sum(weighed * d, axis=1)
            y = _tile(Y, l * r, rs, columns, r, n)
            pull = tl.dot(weighed, tl.trans(y), pull, input_precision="ieee")
            part = tl.dot(tl.trans(x), weighed, input_precision="ieee")
            at = by_x + ((l * tall + down) * r + rs)[:, None].to(tl.int64) * n + columns[None, :]
            inside = (rs < r)[:, None] & (columns < n)[None, :]
            if top > down * H:
                part += tl.load(at, mask=inside, other=0.0)
            tl.store(at, part, mask=inside)
        at = by_y + ((l * wide + right) * m + rows)[:, None].to(tl.int64) * r + rs[None, :]
        tl.store(at, pull, mask=(rows < m)[:, None] & (rs < r)[None, :])
        tl.debug_barrier()  # the next rows read what other threads stored to `by_x`
    tl.store(values + (l * tall + down) * wide + right, tl.sum(value))
