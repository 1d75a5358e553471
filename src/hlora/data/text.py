"""General text: files, folders and hub data sets, packed into blocks without padding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlora.data import pythontext
from hlora.data.read import ROWS, SUFFIXES, load_hub, read_rows, read_text
from hlora.data.rows import Rows
from hlora.errors import InputError

PIECE = 1 << 16
"""Characters that are tokenized at once: a .txt file may be larger than the memory."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.\[\]:%-]+)?$")


@dataclass(frozen=True)
class Source:
    """One kind of text.

    Attributes:
        name: what tables call it.
        where: a file, a folder, `python-docs`, `python-docstrings` or `python-code` with
            `@train` or `@test` (`hlora.data.pythontext`), or `owner/name[:config][@split]` on the
            hub.
        column: the column with the text, or several as `a+b`; None finds it.
        hub: load with `datasets.load_dataset`.
    """

    name: str
    where: str
    column: str | None = None
    hub: bool = False

    @classmethod
    def parse(cls, spec: str, column: str | None = None) -> Source:
        """From `[NAME=]WHERE[#COLUMN]`; `hub:` before WHERE forces the hub's loader.

        Raises:
            InputError: neither a path nor a possible hub name.
        """
        name, sep, where = spec.partition("=")
        if not sep or "/" in name:
            name, where = "", spec
        forced = where.startswith("hub:")
        where = where.removeprefix("hub:")
        if "#" in where and not Path(where).exists():
            where, _, column = where.rpartition("#")
        path = Path(where)
        if not forced and not path.exists() and pythontext.is_name(where):
            _built_in(where)
            return cls(name or where.partition("@")[0], where, column)
        hub = forced or not path.exists()
        if hub and not forced and (path.suffix in SUFFIXES or not _HUB_NAME.match(where)):
            raise InputError(f"There is no text at {where}.")
        return cls(name or re.sub(r"\.(train|test)$", "", path.stem) or where, where, column, hub)

    def documents(self) -> Iterator[str]:
        """The texts, one at a time.

        Raises:
            InputError: nothing there can be read as text.
        """
        if self.hub:
            return _from_hub(self)
        path = Path(self.where)
        if not path.exists() and pythontext.is_name(self.where):
            return iter([pythontext.python_text(*_built_in(self.where))])
        if not path.is_dir():
            return _from_file(path, self.column)
        files = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        if not files:
            raise InputError(f"The folder {path} holds no text ({', '.join(SUFFIXES)}).")
        return (text for file in files for text in _from_file(file, self.column))


def blocks(source: Source, tokenizer: Any, size: int, limit: int | None = None) -> Tensor:
    """The text of a source as blocks of tokens, (N, size) int64.

    Documents follow each other with the end-of-text token between them; what does not fill the
    last block is left out.

    Args:
        limit: stop after so many blocks.

    Raises:
        InputError: the text is empty or shorter than one block.
    """
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    wanted = None if limit is None else limit * size
    empty = True
    for document in source.documents():
        for piece in _pieces(document):
            empty = empty and not piece.strip()
            tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            tokens.append(end)
        if wanted is not None and len(tokens) >= wanted:
            break
    if empty:
        raise InputError(f"The text {source.where} is empty.")
    count = len(tokens) // size
    if limit is not None:
        count = min(count, limit)
    if count == 0:
        raise InputError(
            f"The text {source.where} has {len(tokens)} tokens, less than one block of {size}: "
            "give more text, or a smaller --block-size."
        )
    return torch.tensor(tokens[: count * size], dtype=torch.int64).reshape(count, size)


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
    if weights is None:
        shares = [n / sum(sizes) for n in sizes]
    else:
        if len(weights) != len(kinds):
            raise InputError(
                f"--text-weights gives {len(weights)} numbers for {len(kinds)} kinds of text."
            )
        if any(not w > 0 for w in weights):
            raise InputError("--text-weights must be positive numbers.")
        shares = [w / sum(weights) for w in weights]
    total = min(n / share for n, share in zip(sizes, shares, strict=True))
    if limit is not None:
        total = min(total, limit)
    counts = [min(n, max(1, round(total * share))) for n, share in zip(sizes, shares, strict=True)]
    return torch.cat([b[:n] for b, n in zip(kinds.values(), counts, strict=True)])


def block_rows(tokens: Tensor) -> Rows:
    """Blocks (N, T) as rows in which every token is a label."""
    return Rows([{"input_ids": row, "labels": row} for row in tokens])


def _built_in(where: str) -> tuple[str, str]:
    """Kind and split of `python-KIND[@SPLIT]`."""
    name, _, split = where.partition("@")
    kind, split = name.removeprefix(pythontext.PREFIX), split or "train"
    if kind not in pythontext.KINDS or split not in pythontext.SPLITS:
        known = ", ".join(pythontext.PREFIX + k for k in pythontext.KINDS)
        raise InputError(f"There is no text at {where}; built in are {known}, @train or @test.")
    return kind, split


def _pieces(document: str) -> Iterator[str]:
    """Cut at a line break near each PIECE characters."""
    start = 0
    while len(document) - start > 2 * PIECE:
        cut = document.find("\n", start + PIECE, start + 2 * PIECE)
        cut = start + PIECE if cut < 0 else cut + 1
        yield document[start:cut]
        start = cut
    yield document[start:]


def _from_file(path: Path, column: str | None) -> Iterator[str]:
    if path.suffix in ROWS:
        yield from _column(read_rows(path), column, str(path))
    else:
        yield read_text(path)


def _column(rows: Iterator[dict[str, Any]], column: str | None, where: str) -> Iterator[str]:
    for row in rows:
        if column is None:
            strings = [k for k, v in row.items() if isinstance(v, str)]
            if "text" in strings or len(strings) == 1:
                column = "text" if "text" in strings else strings[0]
            else:
                raise InputError(
                    f"{where} has the columns {', '.join(row)}: name the one with the text with "
                    "--text-column."
                )
        parts = [row.get(c) for c in column.split("+")]
        if not all(isinstance(p, str) for p in parts):
            raise InputError(
                f"{where} has no text column {column!r}; its columns are {', '.join(row)}."
            )
        yield "\n".join(p for p in parts if isinstance(p, str))


def _from_hub(source: Source) -> Iterator[str]:
    yield from _column(load_hub(source.where), source.column, source.where)
