"""KL to the base model on general text while tuning: the peer that needs general text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.regularizer import Regularizer
from hlora.errors import InputError


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) at each token, (...), from logits (..., V)."""
    p, q = (logits.float().log_softmax(-1) for logits in (before, after))
    return (p.exp() * (p - q)).sum(-1)


def by_row(before: Tensor, after: Tensor) -> Tensor:
    """The mean of each row, (N,), from logits (N, T, V).

    Row by row: a batch's log-softmax over a large vocabulary takes gigabytes.
    """
    return torch.stack([divergences(b, a).mean() for b, a in zip(before, after, strict=True)])


class Divergence(Regularizer):
    """φ · KL(base ‖ model) on rows of general text, nats per token.

    A micro-batch in `every` takes the next rows, forward once with the adapter and once without,
    and counts `every` times, so that φ means the same however seldom it is looked at.

    Args:
        rows: (N, T) tokens.
        phi: its weight.
        batch: rows looked at together.
        every: micro-batches from one look to the next.

    Raises:
        InputError: no rows, or a number below one.
    """

    def __init__(self, rows: Tensor, phi: float = 1.0, batch: int = 4, every: int = 4) -> None:
        if not len(rows) or batch < 1 or every < 1:
            raise InputError("Divergence needs rows of text, batch >= 1 and every >= 1.")
        self.rows, self.phi, self.batch, self.every = rows, phi, batch, every
        self.seen = 0

    def on_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:
        self.seen += 1
        if self.seen % self.every:
            return None
        start = (self.seen // self.every - 1) * self.batch
        index = torch.arange(start, start + self.batch) % len(self.rows)
        ids = self.rows[index].to(next(model.parameters()).device)
        with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
            before = model(input_ids=ids).logits
        return self.every * divergences(before, model(input_ids=ids).logits).mean()

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor([self.seen])}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.seen = int(tensors["seen"])
