"""Tokens drawn from what a model predicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PART = 256


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of logits (N, V) float32, by its probability: (N,) int64."""
    of = logits.softmax(-1)
    if of.device.type != "cpu":
        return torch.multinomial(of, 1, generator=generator).squeeze(1)
    return in_two_steps(of, generator)


def in_two_steps(of: Tensor, generator: torch.Generator) -> Tensor:
    """The same as `torch.multinomial(of, 1)` of weights (N, V), with other random numbers.

    That one draws an exponential for every token of the vocabulary, one after another on a CPU.
    Here a part of the vocabulary is drawn first, and then a token of that part.
    """
    parts = nn.functional.pad(of, (0, -of.shape[1] % _PART)).unflatten(1, (-1, _PART))
    part = _pick(parts.sum(-1), generator)
    return part * _PART + _pick(parts[torch.arange(len(of)), part], generator)


def _pick(weights: Tensor, generator: torch.Generator) -> Tensor:
    up_to = weights.double().cumsum(-1)
    whole = up_to[:, -1:]
    at = torch.rand(len(weights), 1, generator=generator, dtype=torch.float64) * whole
    # Below the whole even when rounded, so that what is drawn has a weight.
    at = torch.minimum(at, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(up_to, at, right=True).squeeze(1)
