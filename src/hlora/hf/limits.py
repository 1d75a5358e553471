"""What a model can read: how many tokens it knows, and how many it takes at once."""

from __future__ import annotations

from typing import Any

from torch import nn


def vocabulary(model: nn.Module) -> int:
    """How many tokens the model knows, also where an adapter wraps their embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def context(model: nn.Module) -> int:
    """How many tokens the model takes at once."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, key, None), int):
            return int(getattr(config, key))
    return 1 << 30
