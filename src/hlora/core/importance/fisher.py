"""Diagonal Fisher information of the target matrices: the importance of EWC.

F_i = E[(∂ log p(y|x) / ∂θ_i)²] over sequences x of general text, with the labels y sampled from the
model itself. Only the target matrices are looked at, in the batched passes of `passes`. (Xiang
et al. 2023 square the gradients of all parameters, one sequence at a
time, with the corpus tokens as labels: `fisher_original`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hlora.core import ops
from hlora.core.importance import fisher_original
from hlora.core.importance.dense import Dense
from hlora.core.importance.passes import backward_passes
from hlora.core.pairs import Pair
from hlora.errors import InputError

LEAN = 200
"""Sequences that the lean Fisher takes unless told otherwise."""


class Fisher(Dense):
    """F by layer name, (m, n) each. Stored and weighed as any dense importance."""

    kind = "fisher"
    trained = False

    @classmethod
    def rows_needed(cls, options: dict[str, Any]) -> int:
        original = options.get("method") == "original"
        if original and options.get("labels") == "model":
            raise InputError(
                "--fisher-method original takes the corpus' labels: leave out --fisher-labels."
            )
        return options.get("sequences") or (fisher_original.SEQUENCES if original else LEAN)

    @classmethod
    def gather(
        cls, model: nn.Module, pairs: list[Pair], rows: Tensor, *, method: str = "lean",
        **options: Any,
    ) -> tuple[Fisher, dict[str, Any]]:  # fmt: skip
        """The mean over rows.

        Args:
            method: `lean` or `original` (as EWC-LoRA published it).
            options: of `passes.backward_passes`; the original looks at `tick` only.
        """
        notes: dict[str, Any] = {"sequences": len(rows), "method": method}
        if method == "original":
            sums, everything = fisher_original.gather(model, pairs, rows, tick=options.get("tick"))
            return cls(sums), {**notes, "labels": "corpus", "all_parameters_bytes": everything}
        sums = {n: torch.zeros(p.shape[:2], device=p.A.device) for p in pairs for n in p.names}
        backward_passes(
            model, pairs, rows,
            lambda name, delta, x: ops.add_squared_gradients(sums[name], delta, x), **options,
        )  # fmt: skip
        means = {n: s / len(rows) for n, s in sums.items()}
        return cls(means), {**notes, "labels": options.get("labels", "model")}

    @staticmethod
    def describe(summary: dict[str, Any]) -> list[str]:
        return [
            f"Fisher information of {summary['sequences']} sequences on {summary['layers']} layers."
        ]
