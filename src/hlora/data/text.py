"""General text as tokens, packed into blocks without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hlora.data.encode import encode, leading, render_chat
from hlora.data.rows import Rows
from hlora.data.source import Source
from hlora.errors import InputError


def blocks(
    source: Source, tokenizer: Any, size: int, limit: int | None = None,
    vocabulary: int | None = None, per_document: bool = False,
    tick: Callable[[int], Any] = lambda count: None, fixed: bool = False,
) -> Tensor:  # fmt: skip
    """The text of a source as blocks of tokens, (N, size) int64.

    Documents follow each other with the end-of-text token between them; what does not fill the
    last block is left out. Where the tokenizer begins a text with a token, so does every document
    and every block.

    Args:
        limit: read no more than so many blocks.
        vocabulary: how many tokens the model knows; None does not check.
        per_document: one block from each document, its beginning, so that blocks are independent;
            shorter documents are left out.
        tick: called with the number of tokens just read.
        fixed: nobody can give another size.

    Raises:
        InputError: the text is empty or shorter than one block, or a row that cannot be taken.
    """
    begin = leading(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    wanted = None if limit is None else limit * size
    empty = True
    for document in source.documents():
        before = len(tokens)
        text = document.text
        if isinstance(text, list):
            text = iter([render_chat(tokenizer, text, document.where)])
        start = begin
        for piece in text:
            empty = empty and not piece.strip()
            ids = encode(tokenizer, piece, document.where, vocabulary, special=False)
            tokens += ids if ids[:1] == start else start + ids
            tick(len(ids))
            start = []
            of_it = len(tokens) - before if per_document else 0
            if of_it >= size or (wanted is not None and len(tokens) >= wanted):
                break
        tokens += end
        if per_document:
            whole = size if len(tokens) - before >= size else 0
            del tokens[before + whole :]
        if wanted is not None and len(tokens) >= wanted:
            break
    if empty:
        raise InputError(f"The text {source.where} is empty.")
    found: list[list[int]] = []
    at = 0
    while limit is None or len(found) < limit:
        put = [] if tokens[at : at + 1] == begin else begin
        block = put + tokens[at : at + size - len(put)]
        if len(block) < size:
            break
        at += size - len(put)
        found.append(block)
    if not found:
        raise InputError(
            f"The text {source.where} has {len(tokens)} tokens, less than one block of {size}: "
            f"give more text{'' if fixed else ', or a smaller --block-size'}."
        )
    return torch.tensor(found, dtype=torch.int64)


def mix(kinds: dict[str, Tensor], weights: list[float] | None, limit: int | None) -> Tensor:
    """Blocks of several kinds as one set, (N, size).

    Args:
        kinds: blocks by name.
        weights: the share of each kind. None takes all there is. No block is taken twice, so the
            scarcest kind sets the size.
        limit: at most so many blocks, taken from the kinds in proportion.

    Raises:
        InputError: weights that do not fit.
    """
    sizes = [len(b) for b in kinds.values()]
    parts = sizes if weights is None else weights
    if len(parts) != len(kinds):
        raise InputError(
            f"--text-weights gives {len(parts)} numbers for {len(kinds)} kinds of text."
        )
    if any(not part > 0 for part in parts):
        raise InputError("--text-weights must be positive numbers.")
    shares = [part / sum(parts) for part in parts]
    total = min(n / share for n, share in zip(sizes, shares, strict=True))
    if limit is not None:
        total = min(total, limit)
    counts = [min(n, max(1, round(total * share))) for n, share in zip(sizes, shares, strict=True)]
    return torch.cat([b[:n] for b, n in zip(kinds.values(), counts, strict=True)])


def block_rows(tokens: Tensor) -> Rows:
    """Blocks (N, T) as rows in which every token is a label."""
    return Rows([{"input_ids": row, "labels": row} for row in tokens])
