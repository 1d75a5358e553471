"""How little does a method forget for a given part of what LoRA learns?

A method is the curve of its strengths, with plain LoRA (after the general phase, if it has one) as
strength zero; of a rewound one, what was rewound is. At a share of LoRA's gain
(base NLL minus NLL, on the task) it is read where it forgets least: at a point, or on the line
between two. Errors are of a paired bootstrap over seeds, documents (within their kind) and
questions: all methods see the same draws. The contrasts are named beforehand, or said to be
named later (`contrasts.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hlora.data.parse import packaged
from hlora.study.lines import Line
from hlora.study.methods import METHODS
from hlora.study.rows import Results, Row

LORA, AFTER_NU = Row("lora-mu", None), Row("lora-nu-mu", None)
DRAWS = 2000
MARGIN = 0.005
"""Nats per token within which two methods forget alike."""
MEASURES = {"loss": "blocks", "KL": "divergences"}
"""What is forgotten: the rise of the loss on a document, or the KL from the base model there."""

_SAID = packaged("study", "contrasts.yaml")
SHARES: tuple[float, ...] = tuple(_SAID["shares"])
CONTRASTS: list[list[str]] = _SAID["contrasts"]
LATER: list[list[str]] = _SAID["later"]


@dataclass(frozen=True)
class Estimate:
    """A value, and the middle 95 and 90 % of its bootstrap draws; p of a difference from zero."""

    value: float
    low: float
    high: float
    p: float
    alike: bool
    """90 % of the draws are within the margin of zero."""


@dataclass(frozen=True)
class Matched:
    """One task of a study.

    Attributes:
        kinds: the kinds of text that count.
        measure: of `MEASURES`.
    """

    results: Results
    task: str
    kinds: tuple[str, ...]
    measure: str = "KL"

    @classmethod
    def of(cls, results: Results, task: str, group: str = "unseen", measure: str = "KL") -> Any:
        """On the kinds that no method read, or on the `seen`; None where the runs do not tell."""
        base, lora = (results.of(r, task) for r in (Row("base", None), LORA))
        line = results.lines[0]
        kinds = tuple(line["seen"] if group == "seen" else line["unseen"])
        if not (base and lora and kinds and base[0].get("losses")):
            return None
        if not all(line["text"][k].get(MEASURES[measure]) for line in lora for k in kinds):
            return None
        return cls(results, task, kinds, measure)

    @property
    def methods(self) -> list[str]:
        """Those that have strengths."""
        found = dict.fromkeys(r.method for r in self.results.rows if self.results.of(r, self.task))
        return [m for m in found if m in METHODS and METHODS[m].sweeps]

    @cached_property
    def _base(self) -> Line:
        return self.results.of(Row("base", None), self.task)[0]

    @cached_property
    def _draws(self) -> Any:
        """(draws + 1, seeds), (draws + 1, kinds, documents) and (draws + 1, questions): how much
        each counts; the first draw is the sample itself."""
        random = np.random.default_rng(0)

        def counts(n: int, *shape: int) -> Any:
            drawn = random.multinomial(n, [1 / n] * n, size=(DRAWS, *shape)) / n
            return np.concatenate([np.full((1, *shape, n), 1 / n), drawn])

        documents = [counts(len(self._base["text"][k]["blocks"])) for k in self.kinds]
        seeds = {line["run"]["seed"] for line in self.results.of(LORA, self.task)}
        return counts(len(seeds)), documents, counts(len(self._base["losses"]))

    def _point(self, line: Line) -> tuple[Any, Any]:
        """NLL and forgetting of a run, by draw."""
        _, documents, questions = self._draws
        key = MEASURES[self.measure]
        lost = []
        for kind, weights in zip(self.kinds, documents, strict=True):
            values = np.array(line["text"][kind].get(key) or [0.0] * weights.shape[1])
            if self.measure == "loss":
                values = values - np.array(self._base["text"][kind]["blocks"])
            lost.append(weights @ values)
        return questions @ np.array(line["losses"]), np.mean(lost, axis=0)

    @cached_property
    def _plain(self) -> dict[int, tuple[Any, Any]]:
        lines = self.results.of(LORA, self.task)
        return {line["run"]["seed"]: self._point(line) for line in lines}

    def curve(self, method: str) -> dict[int, list[tuple[Any, Any]]]:
        """By seed: (share of LoRA's gain, forgetting) of each strength, by draw; LoRA first."""
        nll, _ = self._point(self._base)
        of = METHODS[method]
        start = LORA if of.from_base else AFTER_NU
        if of.rewinds:
            start = Row(of.rewinds, of.at)
        rows = [start, *(r for r in self.results.rows if r.method == method)]
        found: dict[int, list[tuple[Any, Any]]] = {}
        for seed, (plain, _) in self._plain.items():
            lines = [line for r in rows for line in self.results.of(r, self.task)]
            points = [self._point(line) for line in lines if line["run"]["seed"] == seed]
            if len(points) > 1:
                found[seed] = [((nll - of) / (nll - plain), lost) for of, lost in points]
        return found

    def least(self, method: str, share: float) -> Any | None:
        """The least that the method forgets with so much of the gain, by draw; None without runs.

        The mean over seeds.
        """
        curve = self.curve(method)
        if curve.keys() != self._plain.keys():
            return None
        return self._over_seeds([_least(curve[seed], share) for seed in self._plain])

    def plain(self) -> Any:
        """What plain LoRA forgets, by draw."""
        return self._over_seeds([lost for _, lost in self._plain.values()])

    def _over_seeds(self, by_seed: list[Any]) -> Any:
        return (self._draws[0] * np.stack(by_seed, axis=1)).sum(1)


def _least(points: Sequence[tuple[Any, Any]], share: float) -> Any:
    """Of one seed, by draw: over the points with the gain, and where a line between two has it."""
    gains, lost = (np.stack(part) for part in zip(*points, strict=True))
    order = np.argsort(-lost, axis=0)  # from plain LoRA to the strongest
    gains, lost = np.take_along_axis(gains, order, 0), np.take_along_axis(lost, order, 0)
    best = np.where(gains >= share, lost, np.inf).min(0)
    g0, g1, f0, f1 = gains[:-1], gains[1:], lost[:-1], lost[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (share - g0) / (g1 - g0)
    crossed = np.where((t > 0) & (t < 1), f0 + t * (f1 - f0), np.inf).min(0, initial=np.inf)
    return np.minimum(best, crossed)


def estimate(draws: Any) -> Estimate:
    """From draws whose first is the sample itself."""
    value, drawn = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
    if not len(drawn) or not np.isfinite(value):
        return Estimate(value, math.nan, math.nan, math.nan, False)
    low, lower, upper, high = np.quantile(drawn, [0.025, 0.05, 0.95, 0.975])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * float(tail + 1) / (len(drawn) + 1))
    return Estimate(value, float(low), float(high), p, bool(max(-lower, upper) < MARGIN))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for as many tests (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = worst
    return found
