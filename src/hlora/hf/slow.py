"""A slow copy of the adapter, which training is held to and ends in (I-LoRA, arXiv 2402.18865)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlora.core.pairs import Group, group, unstack
from hlora.core.quadratic import Anchor
from hlora.errors import InputError, is_number
from hlora.hf.divergence import Divergence
from hlora.hf.peft import find_pairs

_KEYS = ("slow.B.{}", "slow.A.{}")


class ToSlow(Divergence):
    """φ · KL(slow copy ‖ model) on rows of general text, nats per token.

    The slow copy is an average of A and of B over about the last 1/(1 − decay) steps, and takes the
    adapter's place when training ends. I-LoRA takes the squared distance of hidden states in place
    of the KL divergence.

    Args:
        rows: (N, T) tokens.
        phi: its weight; at 0 there is no slow copy.
        decay: what stays of the copy at each step.
        batch: rows looked at together.
        every: micro-batches from one look to the next.

    Raises:
        InputError: as `Divergence`, or a decay that is not between 0 and 1.
    """

    def __init__(
        self, rows: Tensor, phi: float = 1.0, decay: float = 0.98, batch: int = 4, every: int = 4
    ) -> None:
        super().__init__(rows, phi, batch, every)
        if not (is_number(decay) and 0 < decay < 1):
            raise InputError(f"The decay of a slow copy must be between 0 and 1, not {decay!r}.")
        self.decay = decay
        self.slow: Anchor = {}
        self._groups: list[Group] = []
        self._stored: dict[str, Tensor] = {}

    def before_step(self, groups: list[Group]) -> None:
        """The copy follows where the last step led."""
        self._groups = groups
        for g in groups:
            here = g.factors()
            if g.names not in self.slow:
                self.slow[g.names] = (
                    (g.stack(self._stored, _KEYS[0]), g.stack(self._stored, _KEYS[1]))
                    if self._stored
                    else here
                )
            for copy, now in zip(self.slow[g.names], here, strict=True):
                copy.lerp_(now, 1 - self.decay)

    def let_go(self) -> None:
        self._groups = []

    def before(self, model: nn.Module, ids: Tensor) -> Tensor:
        if not self.slow:  # the first step: the copy is the adapter
            return model(input_ids=ids).logits
        names = {id(p): n for n, p in model.named_parameters()}
        copy = {
            names[id(f)]: value.to(f.dtype)
            for g in self._groups or group(find_pairs(model, "warn"))
            for p, *both in zip(g.pairs, *self.slow[g.names], strict=True)
            for f, value in zip((p.B, p.A), both, strict=True)
        }
        return torch.func.functional_call(model, copy, kwargs={"input_ids": ids}).logits

    def at_end(self, groups: list[Group]) -> None:
        self.before_step(groups)
        for g in groups:
            g.set_factors(*self.slow[g.names])

    def state(self) -> dict[str, Tensor]:
        found = super().state()
        for names, both in self.slow.items():
            found |= unstack(names, both, _KEYS)
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self._stored = {k: v for k, v in tensors.items() if k.startswith("slow.")}
