"""The paper's own figures (arXiv 2501.13669, `paper.yaml`), to stand beside ours.

Perplexities are as printed, 2 to the mean loss in nats; `e_perplexity` converts them. What is known
to be wrong with the protocol: docs/paper.md.
"""

from __future__ import annotations

import math

from hlora.data.parse import packaged

Score = tuple[float, float]
"""Perplexity as printed, accuracy in per cent."""

_PAPER = packaged("study", "paper.yaml")
TASKS: list[str] = _PAPER["tasks"]
TABLE_1: dict[str, dict[str, list[Score]]] = _PAPER["table_1"]
TABLE_2: dict[str, dict[str, list[Score]]] = _PAPER["table_2"]
"""Model → method (names of `hlora.study.methods`) → a score for each task."""
COST: dict[str, dict[str, tuple[float, float]]] = _PAPER["cost"]
"""Fig. 5: hours (one A800) and GB of the importance."""

EWC_SEQUENCES = 20_000
"""Sequences of EWC-LoRA's Fisher, as published (`hlora.core.importance.fisher_original`)."""


def e_perplexity(printed: float) -> float:
    """e to the mean loss in nats, from the 2 to it that the paper prints."""
    return math.exp(math.log2(printed))
