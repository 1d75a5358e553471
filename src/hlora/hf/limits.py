"""What a model can read: how many tokens it knows, how many it takes at once, and which rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hlora.errors import InputError, MismatchError


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


def check_rows(what: str, rows: Tensor, least: int) -> None:
    """Refuse what is no text in tokens, (N, T), with as many rows.

    Raises:
        InputError: no such tensor.
    """
    if not isinstance(rows, Tensor):
        raise InputError(f"{what} must be a tensor of tokens, (N, T), not {type(rows).__name__}.")
    if rows.dim() != 2 or len(rows) < least or rows.shape[1] < 2 or rows.is_floating_point():
        raise InputError(
            f"{what} must be {least} rows or more of two tokens or more, (N, T) whole numbers: it "
            f"is {(*rows.shape,)} of {rows.dtype}."
        )
    if (lowest := int(rows.min())) < 0:
        raise InputError(f"{what} holds {lowest}, which is no token: give the ids of text itself.")


def check_reads(model: nn.Module, what: str, rows: Tensor, length: int) -> None:
    """Refuse rows that a model cannot read, so many tokens of each at once.

    Args:
        what: a whole sentence's subject: "The text that ...".

    Raises:
        MismatchError: the model does not know a token, or does not take as many.
    """
    known, most = vocabulary(model), context(model)
    if (largest := int(rows.max())) >= known:
        raise MismatchError(
            f"{what} has token {largest}, and the model knows {known}: it is of another tokenizer. "
            "Take text, or an importance, that was made for this model."
        )
    if length > most:
        raise MismatchError(
            f"{what} has rows of {length} tokens, and the model takes {most}: give shorter rows."
        )
