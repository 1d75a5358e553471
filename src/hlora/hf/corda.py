"""CorDA (arXiv 2406.05223), knowledge-preserving, by PEFT's decomposition.

LoRA starts as the part of each target matrix that general text needs least, taken out of it; at the
end it is written as plain LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.core.pairs import Pair
from hlora.hf.peft import find_pairs, start_by_corda


class Corda:
    """A model whose adapter starts so.

    Attributes:
        model: W − s·B₀A₀ with an adapter that starts at B₀ and A₀: the base model's predictions.

    Args:
        model: the base model, which is changed.
        config: PEFT's LoraConfig.
        rows: (N, T) tokens of general text.
    """

    def __init__(self, model: nn.Module, config: Any, rows: Tensor) -> None:
        self.config = config
        device = next(model.parameters()).device

        def read() -> None:  # one row at a time, as PEFT's hooks ask for
            for row in rows:
                model(input_ids=row[None].to(device))

        with evaluating(model):
            adapted, self._before = start_by_corda(model, config, read)
        self.model: Any = adapted
        self.pairs = find_pairs(self.model)
        self._first = {p.name: (p.B.detach().clone(), p.A.detach().clone()) for p in self.pairs}

    @torch.no_grad()
    def plain(self) -> tuple[nn.Module, list[Pair]]:
        """The base model as it was, and s(BA − B₀A₀) as LoRA of twice the rank."""
        from peft import get_peft_model

        base: Any = self.model.unload()
        for name, weight in self._before.items():
            base.get_submodule(name).weight.copy_(weight)
        model = get_peft_model(base, replace(self.config, r=2 * self.config.r))
        pairs = find_pairs(model)
        for new, old in zip(pairs, self.pairs, strict=True):
            B0, A0 = self._first[old.name]
            new.B.copy_(torch.cat([old.B, -B0], dim=1) * (old.s / new.s))
            new.A.copy_(torch.cat([old.A, A0]))
        return model, pairs
