"""How little does a method forget for a given part of what LoRA learns?

A method is the curve of its strengths, from plain LoRA (after the general phase, if it has one) on;
of a rewound one, from what was rewound. At a share of LoRA's gain (base NLL minus NLL, on the task)
it is read where it forgets least: at a run, or on the line between two that are no further apart
than `GAP`, the KL on a log scale: what is further apart was not measured. Errors are of a paired
bootstrap over seeds, documents (within their kind) and questions: all methods see the same draws.
The contrasts are named beforehand, or said to be named later (`contrasts.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hlora.data.parse import packaged
from hlora.study.lines import Line, kinds_of
from hlora.study.methods import METHODS
from hlora.study.rows import Results, Row

LORA, AFTER_NU = Row("lora-mu", None), Row("lora-nu-mu", None)
DRAWS = 20_000
"""So many that a p that is corrected for fifty tests is still known where it is small."""
MARGIN = 0.005
"""Nats per token within which two methods forget alike."""
GAP = 4.0
"""Two runs of a method are joined where one forgets at most so many times as much as the other."""
MEASURES = {"loss": "blocks", "KL": "divergences"}
"""What is forgotten: the rise of the loss on a document, or the KL from the base model there."""

_SAID = packaged("study", "contrasts.yaml")
SHARES: tuple[float, ...] = tuple(_SAID["shares"])
CONTRASTS: list[list[str]] = _SAID["contrasts"]
LATER: list[list[str]] = _SAID["later"]


class Point(NamedTuple):
    """A run: what it keeps of LoRA's gain and what it forgets, by draw, and how far it has gone."""

    gain: Any
    lost: Any
    gone: float


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
        """On a group of the kinds of text: those that no method read (`unseen`), those that were
        `seen`, or those `apart`; None where the runs do not tell."""
        base, lora = (results.of(r, task) for r in (Row("base", None), LORA))
        kinds = tuple(kinds_of(results.lines[0], group))
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
    def _draws(self) -> tuple[list[Any], Any]:
        """(draws + 1, documents) of each kind, and (draws + 1, questions): how much each counts;
        the first draw is the sample itself."""
        random = np.random.default_rng(0)
        documents = [_counts(random, len(self._base["text"][k]["blocks"])) for k in self.kinds]
        return documents, _counts(random, len(self._base["losses"]))

    def _point(self, line: Line) -> Point:
        """Its gain as the NLL."""
        documents, questions = self._draws
        key = MEASURES[self.measure]
        lost, gone = [], []
        for kind, weights in zip(self.kinds, documents, strict=True):
            values = np.array(line["text"][kind].get(key) or [0.0] * weights.shape[1])
            if self.measure == "loss":
                values = values - np.array(self._base["text"][kind]["blocks"])
            lost.append(weights @ values)
            gone.append(np.mean(line["text"][kind].get("divergences") or values))
        return Point(
            questions @ np.array(line["losses"]), np.mean(lost, axis=0), float(np.mean(gone))
        )

    @cached_property
    def _plain(self) -> dict[int, Point]:
        lines = self.results.of(LORA, self.task)
        return {line["run"]["seed"]: self._point(line) for line in lines}

    def seeds(self, *methods: str) -> list[int]:
        """Those that all these methods were run with."""
        return [s for s in self._plain if all(len(self.curve(m).get(s, [])) > 1 for m in methods)]

    def curve(self, method: str) -> dict[int, list[Point]]:
        """By seed: its runs, what it starts from first, and then from the weakest to the strongest.

        A run that forgets less was held more strongly, whatever its strength is called.
        """
        return self._curves.get(method, {})

    @cached_property
    def _curves(self) -> dict[str, dict[int, list[Point]]]:
        return {method: self._curve(method) for method in self.methods}

    def _curve(self, method: str) -> dict[int, list[Point]]:
        nll = self._point(self._base).gain
        of = METHODS[method]
        start = LORA if of.from_base else AFTER_NU
        if of.rewinds:
            start = Row(of.rewinds, of.at)
        rows = [start, *(r for r in self.results.rows if r.method == method)]
        lines = [line for r in rows for line in self.results.of(r, self.task)]
        found: dict[int, list[Point]] = {}
        for seed, plain in self._plain.items():
            points = [self._point(line) for line in lines if line["run"]["seed"] == seed]
            gains = [p._replace(gain=(nll - p.gain) / (nll - plain.gain)) for p in points]
            found[seed] = gains[:1] + sorted(gains[1:], key=lambda p: -p.gone)
        return found

    def least(self, method: str, share: float, seeds: Collection[int] = ()) -> Any | None:
        """The least that the method forgets with so much of the gain, by draw; None without runs.

        The mean over these seeds, by default all that it was run with. Infinite where no run keeps
        so much, nor a line between two.
        """
        seeds = seeds or self.seeds(method)
        if not seeds:
            return None
        curve = self.curve(method)
        return self._over_seeds([self._least(curve[s], share) for s in seeds])

    def bounded(self, method: str, share: float, seeds: Collection[int] = ()) -> bool:
        """Whether even the strongest run keeps so much: a stronger one may forget less."""
        curve = self.curve(method)
        return any(curve[s][-1].gain[0] >= share for s in seeds or self.seeds(method))

    def read(self, seed: int, share: float, *methods: str) -> bool:
        """Whether that seed tells what each of these methods forgets with so much of the gain.

        Asked seed by seed: the first runs of a new one must not hide what an earlier one told.
        """
        told = all(self.told(seed, share, m) for m in methods)
        return told and not any(self.bounded(m, share, [seed]) for m in methods)

    def told(self, seed: int, share: float, method: str) -> bool:
        """The same of one method, a bound included."""
        least = self.least(method, share, [seed])
        return least is not None and bool(np.isfinite(least[0]))

    def plain(self) -> Any:
        """What plain LoRA forgets, by draw."""
        return self._over_seeds([p.lost for p in self._plain.values()])

    def _over_seeds(self, by_seed: list[Any]) -> Any:
        weights = _counts(np.random.default_rng(1), len(by_seed))
        return (weights * np.stack(by_seed, axis=1)).sum(1)

    def _least(self, points: Sequence[Point], share: float) -> Any:
        """Of one seed, by draw: over the runs with the gain, and where a line has it."""
        found = np.full(DRAWS + 1, np.inf)
        for point in points[1:]:
            found = np.minimum(found, np.where(point.gain >= share, point.lost, np.inf))
        for a, b in pairwise(points):
            low, high = sorted((a.gone, b.gone))
            if low <= 0 or high <= GAP * low:  # where no KL was measured, what is learned
                found = np.minimum(found, self._between(a, b, share))
        return found

    def _between(self, a: Point, b: Point, share: float) -> Any:
        log = self.measure == "KL" and min(a.lost.min(), b.lost.min()) > 0
        f0, f1 = (np.log(p.lost) if log else p.lost for p in (a, b))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (share - a.gain) / (b.gain - a.gain)
            read = f0 + t * (f1 - f0)
        return np.where((t > 0) & (t < 1), np.exp(read) if log else read, np.inf)


def _counts(random: Any, n: int) -> Any:
    """(draws + 1, n): how much each of n counts in a draw with replacement; first, all alike."""
    drawn = random.multinomial(n, [1 / n] * n, size=DRAWS) / n
    return np.concatenate([np.full((1, n), 1 / n), drawn])


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
