"""The paper's claims (`claims.yaml`), each judged from the runs at hand.

A difference counts when a t-test over seeds decides it at the 5 % level: runs that share their seed
are compared, each the mean over tasks, or task by task where tasks are on scales of their own. So
a claim can also stay open.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hlora.core.layers import layer_grid
from hlora.data.parse import packaged
from hlora.study.cost import cost_of
from hlora.study.metrics import FORGETTING, METRICS
from hlora.study.rows import Results, Row
from hlora.study.stats import Paired, p_text, paired

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not decided", "not measured"
ALIKE = "no difference seen"
JUDGED = ("hlora", "hlora-factored", "hlora-paper", "hlora-official")
"""The methods whose rows the claims are judged for."""


class Evidence(NamedTuple):
    """One comparison behind a verdict."""

    against: str
    found: str
    p: str
    word: str


@dataclass(frozen=True)
class Verdict:
    """What became of a claim, and what says so."""

    claim: str
    word: str
    evidence: list[Evidence]


Judged = tuple[str, list[Evidence]]


def judge(results: Results, ours: Row) -> list[Verdict]:
    """All claims for one row of HLoRA."""
    return [
        Verdict(claim["claim"], *of(results, ours, **claim[name]))
        for claim in packaged("study", "claims.yaml")
        for name, of in JUDGES.items()
        if name in claim
    ]


def shared_tasks(results: Results, ours: Row, other: Row) -> list[str]:
    """The tasks that both rows ran with most seeds in common.

    A method that is too dear for every task is compared on those where its seeds are.
    """
    common = {t: len({*results.whole(ours, t)} & {*results.whole(other, t)}) for t in results.tasks}
    most = max(common.values(), default=0)
    return [t for t, n in common.items() if n == most > 0]


def difference(
    results: Results, metric: str, ours: Row, other: Row, task: str | None = None
) -> Paired:
    """Ours minus the other's over seeds, on a task, or each the mean over those that they share."""
    tasks = [task] if task else shared_tasks(results, ours, other)
    return paired(results.values(metric, ours, *tasks), results.values(metric, other, *tasks))


def named_with_tasks(results: Results, ours: Row, other: Row) -> str:
    """The other row's label, and the tasks of the comparison where they are not all."""
    tasks = shared_tasks(results, ours, other)
    return other.label + ("" if tasks == results.tasks else f" ({', '.join(tasks)})")


def mean_norms(results: Results, row: Row) -> dict[str, float]:
    """‖Ω_l‖₂ by layer, the mean over the seeds' phases ν."""
    by_seed = {r["run"]["seed"]: r["norms"] for r in results.of(row) if r.get("norms")}
    names = next(iter(by_seed.values()), {})
    return {n: statistics.fmean(v[n] for v in by_seed.values()) for n in names}


def _against(
    results: Results, ours: Row, metric: str, methods: list[str],
    higher: bool = False, or_equal: bool = False,
) -> Judged:  # fmt: skip
    """Better than every row of these methods; with `or_equal`, worse than none that can be seen."""
    said = []
    for other in [r for r in results.rows if r.method in methods and r != ours]:
        pooled = METRICS[metric].pooled
        for task in [None] if pooled else shared_tasks(results, ours, other):
            d = difference(results, metric, ours, other, task)
            if not d.n or (d.n == 1 and len(results.seeds) > 1):  # nothing to tell
                continue
            undecided = ALIKE if or_equal else OPEN
            word = (HOLDS if (d.mean > 0) == higher else FAILS) if d.decided else undecided
            name = f"{other.label} ({task})" if task else named_with_tasks(results, ours, other)
            said.append(_evidence(name, d, metric, word))
    return _together(said), said


def _evidence(against: str, d: Paired, metric: str, word: str) -> Evidence:
    return Evidence(against, d.shown(METRICS[metric].digits), p_text(d.p), word)


def _together(said: list[Evidence]) -> str:
    """The one word of all, or how often each was said."""
    counts = Counter(of.word for of in said)
    if len(counts) < 2:
        return said[0].word if said else MISSING
    return ", ".join(f"{counts[w]} × {w}" for w in (HOLDS, ALIKE, OPEN, FAILS) if counts[w])


def _below_base(results: Results, ours: Row, metric: str) -> Judged:
    lost = results.values(metric, ours, *results.tasks)
    d = paired(lost, dict.fromkeys(lost, 0.0))
    if not d.n:
        return MISSING, []
    word = OPEN if not d.decided else HOLDS if d.mean < 0 else FAILS
    return word, [_evidence("the base model", d, metric, word)]


def _ablation(results: Results, ours: Row, without: str) -> Judged:
    """Forgets less than the same preset without a part."""
    name = f"{ours.method}-{without}" if without else "lora-nu-mu"
    if not any(r.method == name and r.phi in (None, ours.phi) for r in results.rows):
        return MISSING, []
    said = [
        of._replace(against=f"{of.against}: {METRICS[metric].label}")
        for metric in FORGETTING
        for of in _against(results, ours, metric, [name])[1]
    ]
    return _together(said), said


def _r_rises_and_falls(results: Results, ours: Row) -> Judged:
    logs = [[e["R"] for e in r.get("log", []) if "R" in e] for r in results.of(ours)]
    logs = [R for R in logs if len(R) > 2]
    if not logs:
        return MISSING, []
    n = len(logs)
    rises, falls = sum(R[0] < 0.5 * max(R) for R in logs), sum(R[-1] < max(R) for R in logs)
    word = HOLDS if rises == falls == n else FAILS if min(rises, falls) < n / 2 else OPEN
    found = f"it rises from near zero in {rises} and ends below its peak in {falls} of {n}"
    return word, [Evidence("its own course", found, "–", word)]


def _cheaper(results: Results, ours: Row, than: str) -> Judged:
    """Phase ν takes less time than a Fisher, the published one scaled to its 20,000 sequences."""
    mine, theirs = cost_of(results, ours.method), cost_of(results, than)
    if mine is None or theirs is None:
        return MISSING, []
    word = HOLDS if mine.seconds < theirs.seconds else FAILS
    against = f"the Fisher, {theirs.sequences:,} sequences"
    if theirs.extrapolated:
        against += f" (extrapolated from {theirs.timed})"
    found = f"general phase (ν) {mine.seconds:.0f} s, the Fisher {theirs.seconds:.0f} s"
    return word, [Evidence(against, found, "–", word)]


def _first_and_last_values(results: Results, ours: Row) -> Judged:
    """Fig. 7: v_proj of the first four blocks and the last one stand out."""
    norms = mean_norms(results, ours)
    targets, blocks, cells = layer_grid(norms) if norms else ([], [], [])
    if "v_proj" not in targets or len(blocks) < 6:
        return MISSING, []
    found = {
        (target, block): value or 0.0
        for target, row in zip(targets, cells, strict=True)
        for block, value in zip(blocks, row, strict=True)
    }
    top = sorted(found, key=lambda at: -found[at])[:5]
    hits = len({("v_proj", b) for b in (*blocks[:4], blocks[-1])} & set(top))
    word = HOLDS if hits == 5 else FAILS if hits < 3 else "in part"
    told = "largest importance (‖Ω‖₂): " + ", ".join(f"{t} {b}" for t, b in top)
    return word, [Evidence("all other matrices", told, "–", word)]


JUDGES: dict[str, Callable[..., Judged]] = {
    "against": _against,
    "below_base": _below_base,
    "ablation": _ablation,
    "cheaper": _cheaper,
    "r_rises_and_falls": _r_rises_and_falls,
    "first_and_last_values": _first_and_last_values,
}
"""Of the results and the HLoRA row that is judged: a word and the evidence."""
