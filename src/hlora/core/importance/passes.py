"""Passes over text at fixed weights: what every kind that needs no training looks at.

The gradient of log p(y|x) by a target matrix, of one sequence, is ∂/∂θ = Σ_t δ_t x_tᵀ with x_t the
layer's input and δ_t the gradient of its output. Both come from hooks, so one backward pass gives
those of a whole batch and no base weight needs a gradient of its own. What is not Linear (the
experts of a mixture) is looked at by the gradient of θ itself, one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.core.finite import check_predictions
from hlora.core.pairs import Pair
from hlora.core.sampling import drawn
from hlora.errors import UnsupportedModelError

Take = Callable[[str, Tensor, Tensor], None]
"""Called with a matrix's name, δ (b, T, m) and x (b, T, n) of each batch: δᵀx is the gradient."""


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
        batch_size: rows in one pass; one, where a layer is not Linear.
        seed: of the sampled labels.
        tick: called with the number of rows just done.

    Raises:
        DivergedError: the model's predictions are not finite.
        UnsupportedModelError: a layer sees tokens without their sequences.
    """
    device = pairs[0].A.device
    generator = torch.Generator(device=device).manual_seed(seed)
    factors = [f for p in pairs for f in (p.B, p.A) if f.requires_grad]
    shape = [0, 0]  # of the batch that is run
    handles = [_watch(p, take, shape) for p in pairs]
    try:
        with evaluating(model):
            for part in rows.split(1 if any(p.theta for p in pairs) else batch_size):
                ids = part.to(device)
                shape[:] = ids.shape
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


def _watch(pair: Pair, take: Take, shape: list[int]) -> Any:
    """Hooks that hand over δ and x when δ comes, and a handle to remove them."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = _by_sequence(inputs[0].detach(), shape, pair.name)
        output.register_hook(lambda d: take(pair.name, _by_sequence(d, shape, pair.name), x))

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert pair.theta is not None
        pair.theta().register_hook(lambda of_all: _take_each(pair, of_all, take))

    if pair.theta is None:
        return pair.layer.register_forward_hook(hook)
    return pair.layer.register_forward_pre_hook(before)


def _by_sequence(t: Tensor, shape: list[int], name: str) -> Tensor:
    """(b, T, k), of what a layer may see as (b·T, k)."""
    if t.dim() == 3:
        return t
    if t.dim() != 2 or len(t) != prod(shape):
        raise UnsupportedModelError(
            f"{name} sees tokens without the sequences that they are of: leave it out of the "
            "targets."
        )
    return t.unflatten(0, shape)


@torch.no_grad()
def _take_each(pair: Pair, gradient: Tensor, take: Take) -> None:
    """Of one sequence the gradient g of each matrix, as the product of g and an identity."""
    each = gradient.reshape(-1, *gradient.shape[-2:])
    for name, g in zip(pair.names, each.mT if pair.transposed else each, strict=True):
        one = torch.eye(min(g.shape), dtype=g.dtype, device=g.device)
        take(name, *((one[None], g[None]) if len(g) == len(one) else (g.mT[None], one[None])))


@torch.no_grad()
def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Row by row, for the sake of memory."""
    return torch.stack([drawn(row, generator) for row in logits])
