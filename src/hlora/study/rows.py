"""The runs of a study as rows (a method at one φ) with a value for each task and seed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hlora.errors import InputError, refuse_unknown
from hlora.run.means import mean_se
from hlora.study.lines import Line, read_lines, with_apart
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS


@dataclass(frozen=True, order=True)
class Row:
    """A method at one value of φ."""

    method: str
    phi: float | None

    @property
    def label(self) -> str:
        name = METHODS[self.method].label if self.method in METHODS else self.method
        if self.phi is None:
            return name
        # A φ that stands for the strength, and not with a number as what is fixed.
        named = re.sub(r"φ(?! [\d.])", f"{self.phi:g}", name)
        return named if named != name else f"{name}, φ {self.phi:g}"


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
        place = {method: i for i, method in enumerate(METHODS)}
        found = {Row(r["run"]["method"], r["run"]["phi"]) for r in self.lines}
        return sorted(
            found,
            key=lambda r: (place.get(r.method, len(place)), -1.0 if r.phi is None else r.phi),
        )

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(r["run"]["task"] for r in self.lines))

    @property
    def seeds(self) -> list[int]:
        return sorted({r["run"]["seed"] for r in self.lines})

    def seeds_of(self, task: str) -> list[int]:
        return sorted({r["run"]["seed"] for r in self.lines if r["run"]["task"] == task})

    def of(self, row: Row, task: str | None = None) -> list[Line]:
        """The lines of a row, of one task or of all."""
        return [
            r for r in self.lines
            if (r["run"]["method"], r["run"]["phi"]) == (row.method, row.phi)
            and task in (None, r["run"]["task"])
        ]  # fmt: skip

    @cached_property
    def cells(self) -> dict[str, dict[int, dict[str, dict[str, float | None]]]]:
        """By row label, seed (ascending) and task: every metric, `forgetting_KIND` by kind, and
        `acc_NAME` and `nll_NAME` of the tasks that were not trained on."""
        found: dict[str, dict[int, dict[str, dict[str, float | None]]]] = {}
        for line in sorted(self.lines, key=lambda r: r["run"]["seed"]):
            run = line["run"]
            of = found.setdefault(Row(run["method"], run["phi"]).label, {})
            of.setdefault(run["seed"], {})[run["task"]] = {
                **{name: metric.of(line) for name, metric in METRICS.items()},
                **{f"forgetting_{k}": v["nats"] for k, v in line["forgetting"].items()},
                **{
                    f"{m}_{name}": of[m]
                    for name, of in line.get("others", {}).items()
                    for m in ("acc", "nll")
                },
                "gain": self._gain(line),
            }
        return found

    def _gain(self, line: Line) -> float | None:
        """The fall of the NLL from the base model's, in % of plain LoRA's of the same seed."""
        of = self._nll
        task, seed = line["run"]["task"], line["run"]["seed"]
        base, lora = of.get(("base", task)), of.get(("lora-mu", task, seed))
        if base is None or lora is None or base == lora or line["run"]["method"] == "base":
            return None
        return 100 * (base - line["task"]["nll"]) / (base - lora)

    @cached_property
    def _nll(self) -> dict[tuple, float]:
        """Of the base model by task, of plain LoRA by task and seed."""
        found: dict[tuple, float] = {}
        for line in self.lines:
            run = line["run"]
            if run["method"] == "base":
                found["base", run["task"]] = line["task"]["nll"]
            elif run["method"] == "lora-mu":
                found["lora-mu", run["task"], run["seed"]] = line["task"]["nll"]
        return found

    def values(self, metric: str, row: Row, *tasks: str) -> dict[int, float]:
        """By seed, the mean over these tasks, for the seeds that have them all.

        Empty where tasks are on scales of their own (the NLL of answers of unlike length).
        """
        found = dict[int, float]()
        if len(tasks) > 1 and metric in METRICS and not METRICS[metric].pooled:
            return found
        for seed, of in self.cells.get(row.label, {}).items():
            told = [of.get(task, {}).get(metric) for task in tasks]
            values = [float(v) for v in told if v is not None and not math.isnan(v)]
            if tasks and len(values) == len(tasks):
                found[seed] = sum(values) / len(values)
        return found

    def alike(self, metric: str, rows: Collection[Row], task: str) -> list[dict[int, float]]:
        """The values of each of these rows over the seeds that all of them share, so that a line
        between two joins the same seeds; where they share none, over those that each has."""
        found = [self.values(metric, row, task) for row in rows]
        shared = set.intersection(*map(set, found)) if found else set()
        return [{s: v for s, v in of.items() if s in shared or not shared} for of in found]

    def whole(self, row: Row, *tasks: str) -> list[int]:
        """The seeds that have all these tasks."""
        return [s for s, of in self.cells.get(row.label, {}).items() if {*tasks} <= of.keys()]

    def mean(self, metric: str, row: Row, *tasks: str) -> float:
        """Over the seeds that have all these tasks."""
        return mean_se(self.values(metric, row, *tasks).values())[0]


def read(
    path: Path, where: Iterable[str] = (), *, mixed: bool = False, apart: Collection[str] = ()
) -> Results:
    """The runs of a results file that may be averaged together.

    Args:
        where: `KEY=VALUE` conditions on a line, such as `versions.commit=0123456789` or
            `study.model=tiny` or `run.seed=0`.
        mixed: take runs of different versions or settings as alike, and say so.
        apart: kinds of text that count as neither seen nor unseen.

    Raises:
        InputError: no such file, nothing in it, or runs that differ in version or settings.
    """
    if not path.is_file():
        raise InputError(f"There is no results file {path}: `hlora study` makes one.")
    lines = read_lines(path)
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
            f"{path} holds runs of different settings or versions: {'; '.join(differ)}. Choose "
            f"with --where {differ[0].partition(' is ')[0]}=..., or average all with --mixed."
        )
    return Results(_set_apart(done, apart), failed, differ)


def _set_apart(lines: list[Line], apart: Collection[str]) -> list[Line]:
    if not apart:
        return lines
    refuse_unknown(apart, lines[0]["text"], "--apart: no such kind of text")
    bases = {r["run"]["task"]: r for r in lines if r["run"]["method"] == "base"}
    lacking = {r["run"]["task"] for r in lines} - bases.keys()
    if lacking:
        raise InputError(f"--apart needs the base model's run, which {min(lacking)} has not.")
    return [with_apart(r, bases[r["run"]["task"]], apart) for r in lines]


def _chosen(lines: list[Line], where: list[str], path: Path) -> list[Line]:
    for condition in where:
        key, sep, value = condition.partition("=")
        if not sep:
            raise InputError(f"--where takes KEY=VALUE, not {condition!r}.")
        found = [_flat(r, "run", "study", "versions") for r in lines]
        if not any(key in f for f in found):
            raise InputError(f"No run in {path} has {key!r}; there are {', '.join(found[0])}.")
        kept = [r for r, f in zip(lines, found, strict=True) if f.get(key) == value]
        if not kept:
            values = sorted({f[key] for f in found if key in f})
            raise InputError(f"No run in {path} has {condition}; {key} is {' or '.join(values)}.")
        lines = kept
    return lines


def _flat(line: Line, *parts: str) -> dict[str, str]:
    """What is in these parts of a line, as `a.b` → text."""
    return dict(pair for part in parts for pair in _leaves(part, line.get(part)))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict) or not value:
        yield name, str(value)
        return
    for key, inner in value.items():
        yield from _leaves(f"{name}.{key}", inner)


def _differences(lines: list[Line]) -> list[str]:
    """In what must be the same for runs to be averaged."""
    found = [_flat(r, "study", "versions") for r in lines]
    differ = []
    for key in dict.fromkeys(k for f in found for k in f):
        counts = Counter(f.get(key, "not given") for f in found)
        if len(counts) > 1:
            parts = (f"{v} in {n}" for v, n in sorted(counts.items()))
            differ.append(f"{key} is {', '.join(parts)}")
    return differ
