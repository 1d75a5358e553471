"""What a model predicts without dropout, with gradients, and with its layers checkpointed as ever.

A look asks how far the predictions of the model as it will be used are from another's. With dropout
two passes differ even where the models are the same, and that difference has a gradient: it would
pull the adapter towards making up for what is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hlora.core.evaluating import evaluating


def undropped(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits (N, T, V) of tokens (N, T), in evaluation mode and with gradients.

    Layers that checkpoint do so in training mode only, and compute again in the backward pass, when
    the model trains again: each goes into evaluation mode by itself, both times. A model that
    checkpoints in another way than transformers' layers does not checkpoint here.
    """
    layers = [
        m for m in model.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing and m.training
    ]  # fmt: skip
    # A cache would be written a second time by what is computed again.
    settings = {"use_cache": False} if layers else {}
    with evaluating(model), _checkpointing(layers):
        return model(input_ids=ids, **settings).logits


@contextmanager
def _checkpointing(layers: list[Any]) -> Iterator[None]:
    before = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, before, strict=True):
        layer.training = True
        layer._gradient_checkpointing_func = partial(_of_evaluation, layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = checkpoint


def _of_evaluation(
    layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any
) -> Any:
    def within(*inputs: Any) -> Any:
        with evaluating(layer):
            return forward(*inputs)

    return checkpoint(within, *inputs)
