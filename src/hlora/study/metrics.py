"""The measures of a run, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from hlora.run.means import exp
from hlora.study.cells import Best
from hlora.study.lines import Line, kinds_of

Measure = Callable[[Line], float | None]


@dataclass(frozen=True)
class Metric:
    """One measure.

    Attributes:
        of: from a line of the results; None where the run has no such measure.
        digits: behind the point.
        best: of several values; None where none is better for itself.
        pooled: tasks are on one scale, so that a mean over them says something.
    """

    label: str
    of: Measure
    digits: int = 2
    signed: bool = False
    best: Best | None = None
    pooled: bool = True


def perplexity(line: Line, kinds: Iterable[str]) -> float | None:
    """e to the mean loss over all tokens of these kinds of text."""
    scores = [line["text"][k] for k in kinds if k in line["text"]]
    if not scores:
        return None
    tokens = sum(s["tokens"] for s in scores)
    return exp(sum(s["loss"] * s["tokens"] for s in scores) / tokens)


def _forgetting(group: str) -> Measure:
    return lambda line: line["forgetting"].get(group, {}).get("nats")


def divergence(line: Line, kinds: Iterable[str]) -> float | None:
    """The mean KL from the base over these kinds of text, every kind alike."""
    found = [line["text"][k].get("divergences") or [] for k in kinds if k in line["text"]]
    return fmean(map(fmean, found)) if found and all(found) else None


def _seconds(phase: str) -> Measure:
    return lambda line: line.get("seconds", {}).get(phase)


def _percent(of: Callable[[Line], float]) -> Measure:
    return lambda line: None if math.isnan(of(line)) else 100 * of(line)


METRICS: dict[str, Metric] = {
    "acc": Metric("accuracy %", _percent(lambda line: line["task"]["acc"]), 1, best=max),
    "acc_norm": Metric("acc_norm %", _percent(lambda line: line["task"]["acc_norm"]), 1, best=max),
    "nll": Metric("NLL", lambda line: line["task"]["nll"], 3, best=min, pooled=False),
    "gain": Metric("gain %", lambda line: None, 1, best=max),
    "ppl_seen": Metric("PPL, seen", lambda line: perplexity(line, line["seen"]), best=min),
    "ppl_unseen": Metric("PPL, unseen", lambda line: perplexity(line, line["unseen"]), best=min),
    "forgetting_seen": Metric("forgot, seen", _forgetting("seen"), 3, signed=True, best=min),
    "forgetting_unseen": Metric("forgot, unseen", _forgetting("unseen"), 3, signed=True, best=min),
    "kl_seen": Metric("KL, seen", lambda line: divergence(line, line["seen"]), 3, best=min),
    "kl_unseen": Metric("KL, unseen", lambda line: divergence(line, line["unseen"]), 3, best=min),
    "kl_apart": Metric(
        "KL, apart", lambda line: divergence(line, kinds_of(line, "apart")), 3, best=min
    ),
    "seconds_record": Metric("seconds, general phase (ν)", _seconds("record"), 0),
    "seconds_tune": Metric("seconds, domain phase (μ)", _seconds("tune"), 0),
    "importance_bytes": Metric("importance, bytes", lambda line: line.get("importance_bytes"), 0),
    "peak_bytes": Metric("peak memory, bytes", lambda line: line.get("peak_bytes"), 0),
}
"""By the names that `--metrics` and a study's `metrics` take. Perplexity is e to the nats. The gain
takes three runs: `Results` works it out."""

FORGETTING = ("forgetting_seen", "forgetting_unseen")
