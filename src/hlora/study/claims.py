"""The paper's claims, each judged from the runs at hand.

A difference counts when a t-test over seeds decides it at the 5 % level: runs that share their seed
are compared, each the mean over tasks. So a claim can also stay open.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hlora.study.cost import cost_of
from hlora.study.metrics import FORGETTING, METRICS
from hlora.study.rows import Results, Row
from hlora.study.stats import Paired, p_equals, paired

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not decided", "not measured"
ALIKE = "no difference seen"


@dataclass(frozen=True)
class Verdict:
    """What became of a claim, and the figures that say so."""

    claim: str
    word: str
    evidence: str


Judge = Callable[[Results, Row], tuple[str, str]]
"""Of the results and the HLoRA row that is judged: a word and the evidence."""


def judge(results: Results, ours: Row) -> list[Verdict]:
    """All claims for one row of HLoRA."""
    return [Verdict(claim, *of(results, ours)) for claim, of in CLAIMS]


def shared_tasks(results: Results, ours: Row, other: Row) -> list[str]:
    """The tasks that both rows ran with most seeds in common.

    A method that is too dear for every task is compared on those where its seeds are.
    """
    common = {
        t: len(results.values("nll", ours, t).keys() & results.values("nll", other, t).keys())
        for t in results.tasks
    }
    most = max(common.values(), default=0)
    return [t for t, n in common.items() if n == most > 0]


def difference(results: Results, metric: str, ours: Row, other: Row) -> Paired:
    """Ours minus the other's over seeds, each the mean over the tasks that they share."""
    tasks = shared_tasks(results, ours, other)
    return paired(results.over_tasks(metric, ours, tasks), results.over_tasks(metric, other, tasks))


def named_with_tasks(results: Results, ours: Row, other: Row) -> str:
    """The other row's label, and the tasks of the comparison where they are not all."""
    tasks = shared_tasks(results, ours, other)
    return other.label + ("" if tasks == results.tasks else f" ({', '.join(tasks)})")


def _against(
    metric: str, methods: tuple[str, ...], *, higher: bool = False, or_equal: bool = False
) -> Judge:
    """Better than every row of these methods; with `or_equal`, worse than none that can be seen."""

    def of(results: Results, ours: Row) -> tuple[str, str]:
        others = [r for r in results.rows if r.method in methods and r != ours]
        words, said = [], []
        for other in others:
            d = difference(results, metric, ours, other)
            if not d.n or (d.n == 1 and len(results.seeds) > 1):  # nothing to tell
                continue
            better = (d.mean > 0) if higher else (d.mean < 0)
            if not d.decided:
                words.append(ALIKE if or_equal else OPEN)
            else:
                words.append(HOLDS if better else FAILS)
            said.append(f"{named_with_tasks(results, ours, other)}: {_difference(d, metric)}")
        return _together(words), "; ".join(said)

    return of


def _difference(d: Paired, metric: str) -> str:
    tested = f" (p {p_equals(d.p)})" if d.n > 1 else ""
    return d.shown(METRICS[metric].digits) + tested


def _together(words: list[str]) -> str:
    counts = Counter(words)
    if len(counts) < 2:
        return words[0] if words else MISSING
    return ", ".join(f"{counts[w]} × {w}" for w in (HOLDS, ALIKE, OPEN, FAILS) if counts[w])


def _below_base(metric: str) -> Judge:
    def of(results: Results, ours: Row) -> tuple[str, str]:
        lost = results.over_tasks(metric, ours, results.tasks)
        d = paired(lost, dict.fromkeys(lost, 0.0))
        word = OPEN if not d.decided else HOLDS if d.mean < 0 else FAILS
        return (word if d.n else MISSING), f"forgetting {_difference(d, metric)}" if d.n else ""

    return of


def _ablation(without: str) -> Judge:
    """Forgets less than the same preset without a part."""

    def of(results: Results, ours: Row) -> tuple[str, str]:
        name = f"{ours.method}-{without}" if without else "lora-nu-mu"
        others = [r for r in results.rows if r.method == name and r.phi in (None, ours.phi)]
        if not others:
            return MISSING, ""
        both = [_against(m, (name,))(results, ours) for m in FORGETTING]
        parts = zip(("seen", "unseen"), both, strict=True)
        return _together([w for w, _ in both]), "; ".join(f"{k}: {e}" for k, (_, e) in parts)

    return of


def _r_rises_and_falls(results: Results, ours: Row) -> tuple[str, str]:
    shapes = []
    for line in results.of(ours):
        R = [e["R"] for e in line.get("log", []) if "R" in e]
        if len(R) > 2:
            shapes.append((R[0] < 0.5 * max(R), R[-1] < max(R)))
    if not shapes:
        return MISSING, ""
    rises, falls = sum(r for r, _ in shapes), sum(f for _, f in shapes)
    n = len(shapes)
    word = HOLDS if rises == falls == n else FAILS if min(rises, falls) < n / 2 else OPEN
    return word, f"it rises from near zero in {rises} and ends below its peak in {falls} of {n}"


def _cheaper(method: str) -> Judge:
    """Phase ν takes less time than a Fisher, the published one scaled to its 20,000 sequences."""

    def of(results: Results, ours: Row) -> tuple[str, str]:
        mine, theirs = cost_of(results, ours.method), cost_of(results, method)
        if mine is None or theirs is None:
            return MISSING, ""
        said = f"phase ν {mine.seconds:.0f} s, the Fisher {theirs.seconds:.0f} s for "
        said += f"{theirs.sequences:,} sequences"
        if theirs.extrapolated:
            said += f" (extrapolated from {theirs.timed})"
        return (HOLDS if mine.seconds < theirs.seconds else FAILS), said

    return of


def _first_and_last_values(results: Results, ours: Row) -> tuple[str, str]:
    """Fig. 7: v_proj of the first four blocks and the last one stand out."""
    from hlora.core.layers import layer_grid

    norms = mean_norms(results, ours)
    if not norms:
        return MISSING, ""
    targets, blocks, cells = layer_grid(norms)
    if "v_proj" not in targets or len(blocks) < 6:
        return MISSING, "the model has no v_proj"
    named = {("v_proj", b) for b in (*blocks[:4], blocks[-1])}
    ranked = sorted(
        ((target, block) for target in targets for block in blocks),
        key=lambda tb: -(cells[targets.index(tb[0])][blocks.index(tb[1])] or 0.0),
    )
    top = ranked[:5]
    hits = len(named & set(top))
    word = HOLDS if hits == 5 else FAILS if hits < 3 else "in part"
    return word, "largest ‖Ω‖₂: " + ", ".join(f"{t} {b}" for t, b in top)


def mean_norms(results: Results, row: Row) -> dict[str, float]:
    """‖Ω_l‖₂ by layer, the mean over the seeds' phases ν."""
    by_seed = {r["run"]["seed"]: r["norms"] for r in results.of(row) if r.get("norms")}
    if not by_seed:
        return {}
    names = next(iter(by_seed.values()))
    return {n: statistics.fmean(v[n] for v in by_seed.values()) for n in names}


_PLAIN = ("lora-mu", "lora-nu-mu", "rslora-mu", "rslora-nu-mu")
_EWC = ("ewc", "ewc-corpus", "ewc-original")

CLAIMS: tuple[tuple[str, Judge], ...] = (
    (
        "Lower perplexity than LoRA and rsLoRA, on text like ν's (Table 1)",
        _against("forgetting_seen", _PLAIN),
    ),
    (
        "Lower perplexity than LoRA and rsLoRA, on unseen kinds of text",
        _against("forgetting_unseen", _PLAIN),
    ),
    (
        "Lower perplexity than EWC-LoRA, on text like ν's (Table 1)",
        _against("forgetting_seen", _EWC),
    ),
    (
        "Lower perplexity than EWC-LoRA, on unseen kinds of text",
        _against("forgetting_unseen", _EWC),
    ),
    (
        "Lower perplexity than EWC-LoRA from the same θ^ν, on text like ν's (ours to ask)",
        _against("forgetting_seen", ("ewc-nu",)),
    ),
    (
        "Lower perplexity than EWC-LoRA from the same θ^ν, on unseen kinds of text",
        _against("forgetting_unseen", ("ewc-nu",)),
    ),
    (
        "Lower perplexity than the base model, on text like ν's (Table 1)",
        _below_base("forgetting_seen"),
    ),
    (
        "Lower perplexity than the base model, on unseen kinds of text",
        _below_base("forgetting_unseen"),
    ),
    (
        "Accuracy no worse than any baseline's (Table 1)",
        _against("acc", (*_PLAIN, *_EWC, "ewc-nu"), higher=True, or_equal=True),
    ),
    (
        "NLL of the right answer no worse than any baseline's (ours to ask)",
        _against("nll", (*_PLAIN, *_EWC, "ewc-nu"), or_equal=True),
    ),
    ("The layer weights help (Table 2, − layer)", _ablation("no-layer")),
    ("The penalty helps (Table 2, − layer, element)", _ablation("")),
    (
        "Importance matters: forgets less than L2 to θ^ν, on unseen kinds of text (ours to ask)",
        _against("forgetting_unseen", ("l2",)),
    ),
    ("The importance takes less time than EWC-LoRA's (Fig. 5)", _cheaper("ewc-original")),
    ("The importance takes less time than a lean Fisher (ours to ask)", _cheaper("ewc")),
    ("R starts at zero, rises, then falls (Fig. 4)", _r_rises_and_falls),
    ("v_proj of the first four blocks and of the last stands out (Fig. 7)", _first_and_last_values),
)
"""Forgetting is the change of log-perplexity against the base, so its order is perplexity's."""
