"""The Fisher information as EWC-LoRA published it (Xiang et al. 2023), to measure what it costs.

All parameters of the base model, one sequence at a time, the corpus' tokens as labels, and every
gradient copied to the CPU, where the squares are added up. The lean one is `fisher`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.core.pairs import Pair, base_parameters

SEQUENCES = 20_000
"""As many as the paper takes."""


def gather(
    model: nn.Module,
    pairs: list[Pair],
    blocks: Tensor,
    *,
    tick: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], int]:
    """F of the target matrices, and the bytes that F of all parameters takes in fp32.

    The mean over blocks of the squared gradient of the mean loss of each.

    Args:
        model: called with `input_ids` and `labels`; a new adapter (B = 0) is the base model.
        pairs: the targets.
        blocks: (N, T) tokens.
        tick: called with the number of blocks just done.
    """
    parameters = base_parameters(model)
    names = {id(p): name for name, p in parameters.items()}
    before = {name: p.requires_grad for name, p in parameters.items()}
    device = pairs[0].A.device
    sums = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    try:
        with evaluating(model):
            for p in parameters.values():
                p.requires_grad_(True)
            for row in blocks:
                model(input_ids=row[None].to(device), labels=row[None].to(device)).loss.backward()
                for name, p in parameters.items():
                    if p.grad is not None:
                        sums[name] += p.grad.detach().to("cpu", torch.float32).square_()
                        p.grad = None
                if tick:
                    tick(1)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])
        model.zero_grad()
    of_targets: dict[str, Tensor] = {}
    for pair in pairs:
        F = (sums[names[id(pair.weight)]] / len(blocks)).to(device)
        each = F.reshape(-1, *F.shape[-2:])
        each = each.mT.contiguous() if pair.transposed else each
        of_targets |= dict(zip(pair.names, each, strict=True))
    return of_targets, sum(4 * s.numel() for s in sums.values())
