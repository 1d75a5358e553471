"""The runs of a study as rows (a method at one φ) with a value for each task and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlora.errors import InputError
from hlora.study.lines import read_results
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS, Line, Measure


@dataclass(frozen=True, order=True)
class Row:
    """A method at one value of φ."""

    method: str
    phi: float | None

    @property
    def label(self) -> str:
        of = METHODS.get(self.method)
        name = of.label if of else self.method
        return name if self.phi is None else f"{name}, φ {self.phi:g}"


@dataclass(frozen=True)
class Results:
    """Comparable runs.

    Attributes:
        lines: one for each run that succeeded.
        failed: those that did not, and have not since.
        mixed: what differs between runs that are treated as alike; empty unless asked for.
    """

    lines: list[Line]
    failed: list[Line]
    mixed: list[str]

    @property
    def rows(self) -> list[Row]:
        """In the order of `hlora.study.methods`, then of φ."""
        order = list(METHODS)
        found = {Row(r["run"]["method"], r["run"]["phi"]) for r in self.lines}

        def place(row: Row) -> tuple[int, float]:
            known = order.index(row.method) if row.method in order else len(order)
            return known, -1.0 if row.phi is None else row.phi

        return sorted(found, key=place)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(r["run"]["task"] for r in self.lines))

    @property
    def seeds(self) -> list[int]:
        return sorted({r["run"]["seed"] for r in self.lines})

    def of(self, row: Row, task: str | None = None) -> list[Line]:
        """The lines of a row, of one task or of all."""
        return [
            r for r in self.lines
            if (r["run"]["method"], r["run"]["phi"]) == (row.method, row.phi)
            and task in (None, r["run"]["task"])
        ]  # fmt: skip

    def values(self, metric: str | Measure, row: Row, task: str) -> dict[int, float]:
        """A measure, by its name or as a function of a line, by seed."""
        of = METRICS[metric].of if isinstance(metric, str) else metric
        found = {r["run"]["seed"]: of(r) for r in self.of(row, task)}
        return {seed: value for seed, value in sorted(found.items()) if value is not None}

    def over_tasks(self, metric: str | Measure, row: Row, tasks: Sequence[str]) -> dict[int, float]:
        """The mean over tasks by seed, for the seeds that have them all."""
        by_task = [self.values(metric, row, task) for task in tasks]
        seeds = set.intersection(*(set(v) for v in by_task)) if by_task else set()
        return {s: statistics.fmean(v[s] for v in by_task) for s in sorted(seeds)}


def read(path: Path, where: Iterable[str] = (), *, mixed: bool = False) -> Results:
    """The runs of a results file that may be averaged together.

    Args:
        where: `KEY=VALUE` conditions on a line, such as `versions.commit=0123456789` or
            `study.model=tiny`.
        mixed: take runs of different versions or settings as alike, and say so.

    Raises:
        InputError: no such file, nothing in it, or runs that differ in version or settings.
    """
    if not path.is_file():
        raise InputError(f"There is no results file {path}: `hlora study` makes one.")
    lines = [r for r in read_results(path) if "run" in r and "key" in r]
    if not lines:
        raise InputError(f"{path} holds no runs yet: `hlora study` adds them.")
    lines = _chosen(lines, list(where), path)
    latest = {r["key"]: r for r in lines}
    done = [r for r in latest.values() if not r.get("error")]
    failed = [r for r in latest.values() if r.get("error")]
    if not done:
        raise InputError(f"All runs in {path} failed, the first with: {failed[0]['error']}")
    differ = _differences(done)
    if differ and not mixed:
        raise InputError(
            f"{path} holds runs that are not alike: {'; '.join(differ)}. Choose some with --where "
            f"{differ[0].partition(' is ')[0]}=..., or average them all with --mixed."
        )
    return Results(done, failed, differ)


def _chosen(lines: list[Line], where: list[str], path: Path) -> list[Line]:
    for condition in where:
        key, sep, value = condition.partition("=")
        if not sep:
            raise InputError(f"--where takes KEY=VALUE, not {condition!r}.")
        found = [_flat(r) for r in lines]
        if not any(key in f for f in found):
            raise InputError(f"No run in {path} has {key!r}; there are {', '.join(found[0])}.")
        kept = [r for r, f in zip(lines, found, strict=True) if f.get(key) == value]
        if not kept:
            values = sorted({f[key] for f in found if key in f})
            raise InputError(f"No run in {path} has {condition}; {key} is {' or '.join(values)}.")
        lines = kept
    return lines


def _flat(line: Line) -> dict[str, str]:
    """Everything that must be the same for two runs to be averaged, as `a.b` → text."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for k, v in value.items():
                walk(f"{prefix}.{k}", v)
        else:
            flat[prefix] = str(value)

    for part in ("study", "versions"):
        walk(part, line.get(part))
    return flat


def _differences(lines: list[Line]) -> list[str]:
    found = [_flat(r) for r in lines]
    differ = []
    for key in dict.fromkeys(k for f in found for k in f):
        values = sorted({f.get(key, "not given") for f in found})
        if len(values) > 1:
            counts = [sum(f.get(key, "not given") == v for f in found) for v in values]
            parts = (f"{v} in {n}" for v, n in zip(values, counts, strict=True))
            differ.append(f"{key} is {', '.join(parts)}")
    return differ


def mean_se(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and its standard error over seeds: NaN for a single one."""
    values = list(values)
    if not values:
        return math.nan, math.nan
    if len(values) == 1:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Iterable[float], digits: int, signed: bool = False) -> str:
    """`mean ± standard error`, or the value of one seed, which is said."""
    values = list(values)
    if not values:
        return "–"
    mean, se = mean_se(values)
    sign = "+" if signed else ""
    text = f"{mean:{sign}.{digits}f}"
    return f"{text} (n = 1)" if len(values) == 1 else f"{text} ± {se:.{digits}f}"
