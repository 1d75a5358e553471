"""Passes over text at fixed weights: what every kind that needs no training looks at.

The gradient of log p(y|x) by a target matrix, of one sequence, is ∂/∂θ = Σ_t δ_t x_tᵀ with x_t the
layer's input and δ_t the gradient of its output. Both come from hooks, so one backward pass gives
those of a whole batch and no base weight needs a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.core.finite import check_predictions
from hlora.core.pairs import Pair

Take = Callable[[Pair, Tensor, Tensor], None]
"""Called with a pair, δ (b, T, m) and x (b, T, n) of each batch."""


def backward_passes(
    model: nn.Module,
    pairs: list[Pair],
    rows: Tensor,
    take: Take,
    *,
    labels: str = "model",
    batch_size: int = 8,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> None:
    """Run all rows forward and backward and hand each layer's δ and x to `take`.

    Args:
        model: called as `model(input_ids=...)`; its output has `logits`.
        pairs: where to look; a new adapter (B = 0) is the base model.
        rows: (N, T) tokens.
        labels: sampled from the `model`, as the Fisher information asks for, or the next tokens of
            the `corpus` (the empirical Fisher).
        batch_size: rows in one pass.
        seed: of the sampled labels.
        tick: called with the number of rows just done.

    Raises:
        DivergedError: the model's predictions are not finite.
    """
    device = pairs[0].A.device
    generator = torch.Generator(device=device).manual_seed(seed)
    factors = [f for p in pairs for f in (p.B, p.A) if f.requires_grad]
    handles = [p.layer.register_forward_hook(_watch(p, take)) for p in pairs]
    try:
        with evaluating(model):
            for part in rows.split(batch_size):
                ids = part.to(device)
                logits = model(input_ids=ids).logits[:, :-1].float()
                check_predictions(model, logits)
                targets = ids[:, 1:] if labels == "corpus" else _sampled(logits, generator)
                # A sum, not a mean: each sequence's log-likelihood has a gradient of its own.
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="sum"
                )
                torch.autograd.grad(
                    loss, factors, allow_unused=True
                )  # text may not reach all of them
                if tick:
                    tick(len(ids))
    finally:
        for handle in handles:
            handle.remove()


def _watch(pair: Pair, take: Take) -> Callable[..., None]:
    """A forward hook that hands over δ and x when δ comes."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda delta: take(pair, delta, x))

    return hook


@torch.no_grad()
def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    flat = logits.softmax(dim=-1).flatten(0, 1)
    return torch.multinomial(flat, 1, generator=generator).reshape(logits.shape[:2])
