"""The base model's predictions on some text, kept: made once for all runs of a study, or before an
adapter moves the weights of its base.

What the head reads is kept in place of the logits: a vocabulary is wider than the model by far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hlora.files import write_whole
from hlora.hf.peft import without_adapter


class Reads:
    """What the head read, batch by batch.

    Attributes:
        batches: (N, T, width) each; None where the logits are more than what the head gives, as in
            models that bound them.
    """

    def __init__(self) -> None:
        self.batches: list[Tensor] | None = []

    def save(self, path: Path) -> None:
        if self.batches:
            tensors = {str(i): batch for i, batch in enumerate(self.batches)}
            write_whole(path, save(tensors))


@contextlib.contextmanager
def listening(model: Any) -> Iterator[Reads]:
    """Keep what the model's head reads while it runs inside."""
    reads, last = Reads(), [torch.empty(0)] * 2

    def head_ran(_: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        last[:] = args[0], logits

    def model_ran(_: nn.Module, args: Any, output: Any) -> None:
        same = torch.equal(last[1], output.logits)
        if reads.batches is not None and same:
            reads.batches.append(last[0].detach().cpu())
        else:
            reads.batches = None

    head = model.get_output_embeddings()
    hooks = [head.register_forward_hook(head_ran), model.register_forward_hook(model_ran)]
    try:
        yield reads
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, path: Path) -> Iterator[Tensor] | None:
    """The base model's, batch by batch (N, T, V); None where nothing was kept.

    Args:
        model: a PEFT model of it.
    """
    if not path.exists():
        return None
    kept = load_file(path)
    return predictions(model, [kept[str(i)] for i in range(len(kept))])


def predictions(
    model: Any, batches: Iterable[Tensor], head: nn.Module | None = None
) -> Iterator[Tensor]:
    """The logits (N, T, V) of each batch (N, T, width) that the base model's head read.

    Args:
        model: a PEFT model of it.
        head: the base model's own, where the adapter moved it.
    """
    head = head or model.get_output_embeddings()
    for batch in batches:
        with torch.no_grad(), without_adapter(model):
            found = head(batch.to(next(model.parameters()).device))
        yield found  # outside, lest the caller's own passes be without the adapter
