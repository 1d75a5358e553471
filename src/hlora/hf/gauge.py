"""Forgetting measured while training: the model is run on text that its base wrote."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.core.pairs import Group
from hlora.core.sharded import agreed
from hlora.hf.divergence import by_row
from hlora.hf.limits import check_reads
from hlora.hf.peft import unwrap, without_adapter

BATCH = 4
SCALE = 1024.0
"""What the divergence is multiplied by on its way backward: where little is forgotten its gradients
by the logits are below what fp16 tells from zero. A power of two, so that nothing else changes."""


class Gauge:
    """KL(base ‖ model) on rows of tokens, nats per token: forward once with the adapter and once
    without.

    The adapter is whatever the model's is when called; nothing is drawn, so training goes on as if
    nobody had looked.

    Args:
        model: a PEFT model, also inside DistributedDataParallel.
        rows: (N, T) tokens.

    Raises:
        MismatchError: the model does not know a token, or does not take as many.
    """

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.model, self.rows = unwrap(model), rows
        check_reads(self.model, "The text that forgetting is measured on", rows, rows.shape[1] - 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, part: Tensor | slice = slice(None)) -> Tensor:
        """A scalar on the model's device."""
        with torch.no_grad(), evaluating(self.model):
            found = [self._of(rows) for rows in self.rows[part].split(BATCH)]
        return agreed(torch.cat(found).mean())

    def pull(self, index: Tensor, groups: list[Group]) -> list[tuple[Tensor, Tensor]]:
        """The gradients of the same on the rows of these numbers, by B (L, m, r) and A (L, r, n).

        The parameters' own gradients stay as they are. Both passes are without dropout: see
        `hlora.hf.undropped`. Row by row, for the sake of memory, as layers that checkpoint do not
        in evaluation, nor, some of them, for `autograd.grad`.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        own = [p.grad for p in trained]
        with torch.enable_grad(), evaluating(self.model):
            of_rows = [
                torch.autograd.grad(
                    SCALE * self._of(row).mean(), trained, allow_unused=True, materialize_grads=True
                )
                for row in self.rows[index].split(1)
            ]
        try:
            for p, found in zip(trained, zip(*of_rows, strict=True), strict=True):
                p.grad = torch.stack(found).mean(0)
            both = (g.gradients() for g in groups)  # in float32: only there it can be scaled back
            return [(agreed(dB / SCALE), agreed(dA / SCALE)) for dB, dA in both]
        finally:
            for p, grad in zip(trained, own, strict=True):
                p.grad = grad

    def _of(self, rows: Tensor) -> Tensor:
        ids = rows[:, :-1].long().to(next(self.model.parameters()).device)
        with torch.no_grad(), without_adapter(self.model):
            before = self.model(input_ids=ids, use_cache=False).logits
        return by_row(before, self.model(input_ids=ids, use_cache=False).logits)
