"""The one row that is trained on, and the one way to make a batch of it.

General text and tasks are alike here, so that mixing them is torch's ConcatDataset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Row = dict[str, Tensor]
"""`input_ids` (T,) and `labels` (T,), int64; a label of -100 is not learned."""

IGNORED = -100


class Rows(torch.utils.data.Dataset):
    """Rows as a data set."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        return sum(len(r["input_ids"]) for r in self.rows)


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
