"""The paper's own figures (arXiv 2501.13669), to stand beside ours.

Perplexities are as printed, 2 to the mean loss in nats; `e_perplexity` converts them. What is known
to be wrong with the protocol: docs/paper.md.
"""

from __future__ import annotations

import math

MODELS = ("LLaMA-3.2-3B", "GPT-J-6B")
TASKS = ("sciq", "piqa", "medmcqa")

Score = tuple[float, float]
"""Perplexity as printed, accuracy in per cent."""

TABLE_1: dict[str, dict[str, tuple[Score, Score, Score]]] = {
    "LLaMA-3.2-3B": {
        "base": ((4.94, 95.10), (4.94, 48.53), (4.94, 18.50)),
        "lora-mu": ((5.05, 96.20), (5.43, 48.75), (5.04, 53.69)),
        "lora-nu-mu": ((5.31, 96.10), (5.58, 46.91), (5.15, 53.12)),
        "rslora-nu-mu": ((5.28, 96.50), (5.71, 47.50), (5.24, 51.92)),
        "ewc": ((4.88, 96.30), (4.98, 48.45), (4.79, 56.39)),
        "hlora": ((4.64, 97.10), (4.90, 51.14), (4.64, 55.80)),
    },
    "GPT-J-6B": {
        "base": ((3.28, 91.60), (3.28, 49.13), (3.28, 21.30)),
        "lora-mu": ((3.43, 96.50), (3.54, 50.16), (3.49, 38.35)),
        "lora-nu-mu": ((3.39, 96.20), (3.52, 49.51), (3.37, 33.66)),
        "rslora-nu-mu": ((3.50, 96.20), (3.65, 49.62), (3.35, 35.69)),
        "ewc": ((3.38, 96.10), (3.47, 49.40), (3.38, 36.48)),
        "hlora": ((3.35, 96.80), (3.40, 50.49), (3.34, 36.10)),
    },
}
"""Model → method (names of `hlora.study.methods`) → SciQ, PIQA, MedMCQA."""

TABLE_2: dict[str, dict[str, tuple[Score, Score, Score]]] = {
    "LLaMA-3.2-3B": {
        "hlora": TABLE_1["LLaMA-3.2-3B"]["hlora"],
        "hlora-no-layer": ((4.75, 96.80), (4.96, 49.70), (4.74, 54.41)),
        "lora-nu-mu": TABLE_1["LLaMA-3.2-3B"]["lora-nu-mu"],
    },
    "GPT-J-6B": {
        "hlora": TABLE_1["GPT-J-6B"]["hlora"],
        "hlora-no-layer": ((3.36, 96.30), (3.41, 49.95), (3.35, 35.62)),
        "lora-nu-mu": TABLE_1["GPT-J-6B"]["lora-nu-mu"],
    },
}
"""The ablation; without layer and element it is LoRA(ν+μ)."""

COST: dict[str, dict[str, Score]] = {
    "LLaMA-3.2-3B": {"ewc-original": (25.97, 11.97), "hlora": (1.19, 1.3)},
    "GPT-J-6B": {"ewc-original": (27.17, 22.65), "hlora": (1.15, 3.5)},
}
"""Fig. 5: hours (one A800) and GB of the importance."""


EWC_SEQUENCES = 20_000
"""Sequences of EWC-LoRA's Fisher, as published (`hlora.core.importance.fisher_original`)."""


def e_perplexity(printed: float) -> float:
    """e to the mean loss in nats, from the 2 to it that the paper prints."""
    return math.exp(math.log2(printed))
