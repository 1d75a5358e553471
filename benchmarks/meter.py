"""Which form of importance predicts what an adapter really forgets, and how small it may be.

    python -m benchmarks.meter --model smollm2-135m --adapter lora --text python-docs python-code

For a trained adapter, at several scales: the KL divergence from the base model measured on text,
and what each form predicts from N sequences gathered at the base (the model's own and of --text,
other rows than those that are measured on). The last columns are how a form follows the exact one
from sequence to sequence, and the numbers that it keeps of each sequence, all matrices together.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from hlora.core.importance.kronecker import Kronecker
from hlora.core.importance.passes import backward_passes
from hlora.core.importance.projected import RANK, bases, project
from hlora.core.lowrank import LowRank
from hlora.core.pairs import group
from hlora.data.source import Source
from hlora.data.text import blocks
from hlora.files import write_json
from hlora.hf.peft import find_pairs
from hlora.run.evaluate import divergence
from hlora.run.models import load, load_adapter
from hlora.run.own_text import own_text

COLUMNS = (1, 2, 4, 8, 16)
RANKS = (1, 2, 4, 8)
CORES = (16, 64)
SCALES = (0.25, 0.5, 1.0)


class Forms:
    """⟨g_nl, D_l⟩ of each sequence, as each form sees it, summed over layers as they come."""

    def __init__(self, changes: dict[str, tuple[Tensor, Tensor]], found: dict[str, Any]) -> None:
        self.changes, self.bases = changes, found
        self.seen: dict[str, list[Tensor]] = {}
        self.apart: list[Tensor] = []
        self.kept: dict[str, int] = {}

    def take(self, name: str, delta: Tensor, x: Tensor) -> None:
        d, x = delta.float(), x.float()
        P, Q = self.changes[name]
        U, V = self.bases[name]
        m, n = d.shape[2], x.shape[2]
        exact = ((d @ P) * (x @ Q.mT)).sum((1, 2))
        self.apart.append(exact)
        self._add("whole sequences", exact, m * n)
        for c in COLUMNS:
            W = V[:, :c]
            self._add(f"{c} columns of V", ((d @ P) * (x @ W @ (Q @ W).mT)).sum((1, 2)), m * c)
        for p in CORES:
            T, W = U[:, :p], V[:, :p]
            both = ((d @ T) @ (T.mT @ P) * (x @ W @ (Q @ W).mT)).sum((1, 2))
            self._add(f"{p} × {p} of U and V", both, p * p)
        left, values, right = _truncated(d, x, max(RANKS))
        each = values * ((left.mT @ P) * (right @ Q.mT)).sum(2)
        for r in RANKS:
            self._add(f"rank {r} of each", each[:, :r].sum(1), r * (m + n))

    def _add(self, name: str, values: Tensor, kept: int) -> None:
        self.seen.setdefault(name, []).append(values)
        self.kept[name] = self.kept.get(name, 0) + kept


def _truncated(d: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of each g = δᵀx, without forming it."""
    probe = torch.randn(x.shape[2], rank + 8, generator=torch.Generator().manual_seed(0))
    Y = torch.linalg.qr(d.mT @ (x @ probe.to(x)))[0]
    Z = torch.linalg.qr(x.mT @ (d @ Y))[0]
    Y = torch.linalg.qr(d.mT @ (x @ Z))[0]
    u, s, vt = torch.linalg.svd((d @ Y).mT @ x, full_matrices=False)
    return (Y @ u)[:, :, :rank], s[:, :rank], vt[:, :rank]


def predicted(forms: Forms, layers: int, tokens: int) -> dict[str, tuple[float, float]]:
    """Nats per token, and the correlation with the exact values over sequences."""

    def together(parts: list[Tensor]) -> Tensor:
        # Layers come in turn, batch by batch.
        by_batch = [parts[i : i + layers] for i in range(0, len(parts), layers)]
        return torch.cat([torch.stack(of).sum(0) for of in by_batch])

    exact = together(forms.seen["whole sequences"])
    found = {}
    for name, parts in forms.seen.items():
        a = together(parts)
        value = float(a.square().mean()) / 2 / tokens
        found[name] = (value, float(torch.corrcoef(torch.stack([a, exact]))[0, 1]))
    apart = sum(float(a.square().sum()) for a in forms.apart) / len(exact) / 2 / tokens
    return {**found, "whole sequences, each layer": (apart, float("nan"))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--text", nargs="+", default=["python-docs", "python-code"])
    parser.add_argument("--measure", nargs="+", default=["python-docs@test", "python-code@test"])
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=16, help="rows of each kind measured")
    parser.add_argument("--json", help="also write everything here")
    given = parser.parse_args(argv)
    result = measure(given)
    if given.json:
        write_json(given.json, result)


def measure(given: Any) -> dict[str, Any]:
    """Print the tables, and return what they hold."""
    from pathlib import Path

    if given.json:
        given.json = Path(given.json)
    model, tokenizer = load(given.model)
    model = load_adapter(model, given.adapter, trainable=True)
    pairs, groups = find_pairs(model), group(find_pairs(model))
    whole = [g.factors() for g in groups]
    changes = [LowRank(g.s * B, A) for g, (B, A) in zip(groups, whole, strict=True)]

    def scaled(scale: float) -> None:
        for g, (B, A) in zip(groups, whole, strict=True):
            g.set_factors(scale * B, A)

    def rows_of(text: list[str], count: int) -> dict[str, Tensor]:
        sources = [Source.parse(t) for t in text]
        return {s.name: blocks(s, tokenizer, given.tokens, count) for s in sources}

    scaled(0.0)
    half = given.sequences // 2
    kinds = rows_of(given.text, -(-half // len(given.text)))
    own = own_text(model, tokenizer, given.sequences - half, given.tokens)
    rows = torch.cat([*kinds.values()])[:half]
    rows = torch.cat([rows, own])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    widest = max(*CORES, *COLUMNS)
    by_name = {
        n: (c.P[i], c.Q[i])
        for g, c in zip(groups, changes, strict=True)
        for i, n in enumerate(g.names)
    }
    forms = Forms(by_name, bases(model, pairs, rows[: len(rows) // 4], widest, 0, {}))
    backward_passes(model, pairs, rows, forms.take, seed=1)
    found = predicted(forms, len(pairs), given.tokens - 1)
    projected = project(model, pairs, rows, rank=RANK)
    kronecker = Kronecker.of(projected, given.tokens - 1)
    kronecker.arrange(groups)
    found["Kronecker, each layer"] = (float(kronecker.forgetting(groups, changes)), float("nan"))
    measured: dict[str, dict[float, float]] = {}
    for name, text in rows_of(given.measure, given.blocks).items():
        measured[name] = {}
        for scale in SCALES:
            scaled(scale)
            measured[name][scale] = divergence(model, text).nats
    for name, of in measured.items():
        print(f"measured on {name}: " + ", ".join(f"{s:g} × {v:.4f}" for s, v in of.items()))
    batches = len(forms.apart) // len(pairs)
    for name, (value, follows) in found.items():
        kept = forms.kept.get(name, 0) // batches
        print(f"{name:<30}{value:9.4f}   {follows:6.3f}   {kept or '':>10}")
    return {
        "settings": {k: str(v) for k, v in vars(given).items()}, "measured": measured,
        "predicted": {k: v[0] for k, v in found.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
