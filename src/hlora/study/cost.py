"""What the importance of a method took: Fig. 5."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from hlora.study.paper import EWC_SEQUENCES as SEQUENCES
from hlora.study.rows import Results


@dataclass(frozen=True)
class Cost:
    """Of one importance.

    Attributes:
        seconds: the mean over seeds; EWC-LoRA's as published is scaled to its 20,000 sequences.
        bytes: on disk; of all parameters where the method keeps them all.
        sequences: that `seconds` stands for; None for a phase ν.
        timed: sequences, or optimizer steps, that were measured.
        seeds: how many phases ν or Fishers.
    """

    seconds: float
    bytes: int
    sequences: int | None
    timed: int | None
    seeds: int

    @property
    def extrapolated(self) -> bool:
        return self.sequences is not None and self.sequences != self.timed


def cost_of(results: Results, method: str) -> Cost | None:
    """The cost of a method's importance; None where it was not run."""
    by_seed = {
        r["run"]["seed"]: r for r in results.lines
        if r["run"]["method"] == method and r.get("seconds")
    }  # fmt: skip
    if not by_seed:
        return None
    lines = list(by_seed.values())
    told, steps = lines[0]["recorded"], lines[0].get("steps")
    timed = told.get("sequences")
    sequences = SEQUENCES if method == "ewc-original" else timed
    scale = sequences / timed if sequences and timed else 1.0
    return Cost(
        seconds=scale * statistics.fmean(r["seconds"]["record"] or 0.0 for r in lines),
        bytes=told.get("all_parameters_bytes", lines[0]["importance_bytes"]),
        sequences=sequences, timed=timed or steps, seeds=len(lines),
    )  # fmt: skip


def costs(results: Results) -> dict[str, Cost]:
    """By the labels of Fig. 5."""
    found = {}
    for method, label in {
        "ewc-original": "EWC-LoRA, as published",
        "ewc": "EWC-LoRA, lean",
        "hlora": "HLoRA, dense: general phase (ν)",
        "hlora-factored": "HLoRA, factored: general phase (ν)",
    }.items():
        if cost := cost_of(results, method):
            suffix = f", {cost.sequences:,} sequences" if cost.sequences else ""
            found[label + suffix] = cost
    return found
