"""Gradients of whole sequences in a basis per matrix.

g = δᵀX (m × n) of one sequence and one matrix, from the output gradients δ (T × m) and the inputs X
(T × n), is never formed. With U (m × p) and V (n × q) that span the largest of E[ggᵀ] and E[gᵀg],
what is kept is g V of each sequence for the first few columns of V, UᵀE[ggᵀ]U, VᵀE[gᵀg]V and the
diagonals. Inputs share few directions, output gradients do not: on SmolLM2 four columns of V keep
96 % of what 32 keep, 64 of U 65 %. A first part of the sequences finds U and V (range finder:
Halko, Martinsson, Tropp 2011), then all of them are projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.importance.bounded import Bounded
from hlora.core.importance.passes import backward_passes
from hlora.core.pairs import Pair
from hlora.errors import UnsupportedModelError

RANK = 16
"""Columns of U and V, where the matrix has as many."""
COLUMNS = 4
"""Columns of V that a sequence of its own is seen in."""
PILOT = 4
"""One sequence in so many finds U and V."""


@dataclass
class Projected:
    """N sequences at one matrix, where a runaway's g is scaled down (see `bounded`).

    Attributes:
        U, V: (m, p) and (n, q), orthonormal columns.
        cores: (N, m, c), g V of each sequence, for the first c columns of V.
        left, right: (p, p) and (q, q), UᵀE[ggᵀ]U and VᵀE[gᵀg]V.
        rows, columns: (m,) and (n,), the diagonals of E[ggᵀ] and E[gᵀg].
        shares: (N,), how much of each sequence's ‖g‖² counts.
    """

    U: Tensor
    V: Tensor
    cores: Tensor
    left: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor
    shares: Tensor


def project(
    model: nn.Module, pairs: list[Pair], rows: Tensor, *, rank: int = RANK, seed: int = 0,
    **passes: Any,
) -> dict[str, Projected]:  # fmt: skip
    """The gradients of all rows (N, T + 1) at every pair, by name.

    Args:
        rank: p and q, at most the matrix's own size.
        seed: of the range finder and of the sampled labels.
        passes: see `backward_passes`.

    Raises:
        DivergedError: predictions or gradients are not finite.
        UnsupportedModelError: a layer that runs more than once in a forward pass.
    """
    spans = bases(model, pairs, rows[: -(-len(rows) // PILOT)], rank, seed, passes)
    names = {n: p for p in pairs for n in p.names}
    cores: dict[str, list[Tensor]] = {n: [] for n in names}
    sums = {n: Bounded(n, len(rows)) for n in names}

    def take(name: str, delta: Tensor, x: Tensor) -> None:
        U, V = spans[name]
        d, x = delta.to(U.dtype), x.to(U.dtype)
        dU, xV, Kx, Kd = d @ U, x @ V, x @ x.mT, d @ d.mT
        cores[name].append(d.mT @ xV[..., :COLUMNS])
        of_rows, of_columns = (d * (Kx @ d)).sum(1), (x * (Kd @ x)).sum(1)
        moments = dU.mT @ Kx @ dU, xV.mT @ Kd @ xV, of_rows, of_columns
        sums[name].add(of_rows.sum(1), *moments)

    backward_passes(model, pairs, rows, take, seed=seed + 1, **passes)
    result = {}
    for name, pair in names.items():
        if not cores[name]:  # the text never reached it
            take(
                name, *(torch.zeros(len(rows), 1, k, device=pair.A.device) for k in pair.shape[:2])
            )
        shares, moments = sums.pop(name).finish()
        if len(shares) != len(rows):
            raise UnsupportedModelError(
                f"{name} runs more than once in a forward pass, so the gradient of a sequence is "
                "not one product: leave it out of the targets."
            )
        together = torch.cat(cores.pop(name)) * shares.sqrt()[:, None, None]
        left, right, of_rows, of_columns = (m / len(rows) for m in moments)
        result[name] = Projected(*spans[name], together, left, right, of_rows, of_columns, shares)
    return result


def bases(
    model: nn.Module, pairs: list[Pair], rows: Tensor, rank: int, seed: int, passes: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """U and V of each pair: the main directions of Σ ggᵀ and Σ gᵀg times random vectors."""
    draw = torch.Generator().manual_seed(seed)
    probes, images = {}, {n: Bounded(n, len(rows)) for p in pairs for n in p.names}
    for p in pairs:
        dtype = torch.promote_types(p.A.dtype, torch.float32)
        for name in p.names:
            probes[name] = [
                torch.randn(size, min(2 * rank, size), generator=draw, dtype=dtype).to(p.A.device)
                for size in p.shape[:2]
            ]

    def take(name: str, delta: Tensor, x: Tensor) -> None:
        of_rows, of_columns = probes[name]
        d, x = delta.to(of_rows.dtype), x.to(of_rows.dtype)
        Kx, Kd = x @ x.mT, d @ d.mT
        images[name].add(
            (Kx * Kd).sum((1, 2)), d.mT @ (Kx @ (d @ of_rows)), x.mT @ (Kd @ (x @ of_columns))
        )

    backward_passes(model, pairs, rows, take, seed=seed, **{**passes, "tick": None})
    spans = {}
    for name, probed in probes.items():
        found = images[name].finish()[1] if images[name].sums else map(torch.zeros_like, probed)
        spans[name] = tuple(torch.linalg.svd(t, full_matrices=False).U[:, :rank] for t in found)
    return spans
