"""The one row that is trained on, and the one way to make a batch of it.

General text and tasks are alike here, so that mixing them is torch's ConcatDataset.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, overload

import torch
from torch import Tensor

Row = dict[str, Tensor]
"""`input_ids` (T,) and `labels` (T,), int64; a label of -100 is not learned."""

IGNORED = -100
FIRST = 32
"""Rows that are looked at before any is trained on."""


class Lazy(Sequence[Row]):
    """Rows that are made when they are first read, and kept.

    Args:
        count: how many there are.
        make: makes one.
    """

    def __init__(self, count: int, make: Callable[[int], Row]) -> None:
        self.length, self.make = count, make
        self.made: dict[int, Row] = {}

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        index = range(self.length)[index]
        if index not in self.made:
            self.made[index] = self.make(index)
        return self.made[index]


class Rows(torch.utils.data.Dataset):
    """Rows as a data set.

    Args:
        source: gives what the rows are made from, as plain values, if not all are made yet.
    """

    def __init__(self, rows: Sequence[Row], source: Callable[[], Any] | None = None) -> None:
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def made(self) -> Collection[Row]:
        """Those that are made already."""
        return self.rows.made.values() if isinstance(self.rows, Lazy) else self.rows

    @property
    def tokens(self) -> str:
        """The number of tokens in words; where not all rows are made yet, an estimate."""
        made = self.made
        found = sum(len(r["input_ids"]) for r in made)
        if len(made) == len(self):
            return f"{found:,} tokens"
        return f"about {round(found * len(self) / max(len(made), 1)):,} tokens"

    def plus(self, others: Rows) -> Rows:
        """These rows, and then the others."""
        first = len(self)

        def row(index: int) -> Row:
            return self[index] if index < first else others[index - first]

        return Rows(Lazy(first + len(others), row), lambda: [self.content(), others.content()])

    def content(self) -> list[Any]:
        """What tells these rows from others, as plain values.

        Of rows that are not all made, the source and the first of them: another tokenizer gives
        other tokens.
        """
        shown = self.rows[:FIRST] if self.source else self.rows
        source = self.source() if self.source else None
        return [source, [[t.tolist() for t in row.values()] for row in shown]]


class Collate:
    """A batch of rows, padded on the right: input_ids, labels and attention_mask, (N, T)."""

    def __init__(self, pad_id: int | None) -> None:
        self.fill = {"input_ids": pad_id or 0, "labels": IGNORED}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = {
            key: torch.nn.utils.rnn.pad_sequence(
                [r[key] for r in rows], batch_first=True, padding_value=fill
            )
            for key, fill in self.fill.items()
        }
        lengths = torch.tensor([[len(r["input_ids"])] for r in rows])
        width = batch["input_ids"].shape[1]
        return {**batch, "attention_mask": (torch.arange(width) < lengths).long()}
