"""The paper's tables, and ours, from the runs of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from hlora.errors import visible
from hlora.files import size
from hlora.study.claims import MISSING, Verdict, difference, named_with_tasks
from hlora.study.cost import Cost
from hlora.study.matched import CONTRASTS, LORA, MARGIN, SHARES, Estimate, Matched, estimate, holm
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS
from hlora.study.paper import COST, TASKS, Score, e_perplexity
from hlora.study.rows import Results, Row
from hlora.study.stats import independent, p_text, shown


def as_markdown(text: str) -> str:
    """Text in one line that Markdown shows as it is: no HTML, no links, no cells."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", visible(text))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"([\\`\[\]|$])", r"\\\1", text)
    text = text.replace("\n", " ").replace("://", r":\//")
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text)


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first column is text, the others are figures."""

    headings: list[str]
    rows: list[list[str]]
    strong: str = ""
    """The first cell of the row to point out."""
    prose: bool = False
    """The first column holds sentences."""

    def markdown(self) -> list[str]:
        """Its lines: figures to the right, and all to the left where there is prose."""
        align = ["---", *(["---" if self.prose else "---:"] * (len(self.headings) - 1))]
        headings, *rows = ([as_markdown(c) for c in row] for row in (self.headings, *self.rows))
        return ["| " + " | ".join(row) + " |" for row in (headings, align, *rows)]


PAPER_NAMES = {"ewc-original": "ewc"}
"""Where the paper has one row for what is two methods here."""

ABLATION = (
    "hlora", "hlora-no-layer", "hlora-paper", "hlora-paper-no-layer", "hlora-official",
    "hlora-official-no-layer", "l2", "lora-nu-mu",
)  # fmt: skip


def beside_the_paper(results: Results, rows: Sequence[Row], paper: dict) -> Table:
    """`PPL / accuracy` by task: ours on text like ν's and on unseen kinds, then the paper's.

    The paper's perplexities, 2 to the nats, are converted to e to the nats.
    """
    headings = ["method", *(f"{t}: seen · unseen / acc" for t in results.tasks)]
    headings += [f"{model.rsplit('-', 1)[0]}, {task}" for model in paper for task in TASKS]
    cells = []
    for row in rows:
        cells.append([row.label, *(_triple(results, row, t) for t in results.tasks)])
        for scores in paper.values():
            of = scores.get(PAPER_NAMES.get(row.method, row.method))
            cells[-1] += map(_converted, of) if of else ["–"] * len(TASKS)
    return Table(headings, cells)


def _triple(results: Results, row: Row, task: str) -> str:
    means = (results.mean(m, row, task) for m in ("ppl_seen", "ppl_unseen", "acc"))
    return "{:.2f} · {:.2f} / {:.1f}".format(*means) if results.of(row, task) else "–"


def _converted(score: Score) -> str:
    return f"{e_perplexity(score[0]):.2f} ({score[0]:.2f}) / {score[1]:.1f}"


def means(results: Results, tasks: Sequence[str], metrics: Sequence[str]) -> Table:
    """The methods that have all these tasks: means over them ± standard error over seeds."""
    cells = []
    for row in results.rows:
        if not all(results.of(row, t) for t in tasks):
            continue
        found = {m: results.values(m, row, *tasks) for m in metrics}
        seeds = len(results.values("nll", row, *tasks))
        cells.append([row.label, *(_shown(m, v) for m, v in found.items()), str(seeds)])
    return Table(["method", *(METRICS[m].label for m in metrics), "seeds"], cells)


def _shown(metric: str, values: dict[int, float]) -> str:
    return shown(values.values(), METRICS[metric].digits, METRICS[metric].signed)


def by_kind(results: Results, rows: Sequence[Row]) -> Table:
    """Forgetting on each kind of text, the mean over tasks; unseen kinds carry a star."""
    kinds, unseen = results.lines[0]["text"], results.lines[0]["unseen"]
    cells = []
    for row in rows:
        lost = [results.values(f"forgetting_{k}", row, *results.tasks).values() for k in kinds]
        cells.append([row.label, *(shown(v, 3, signed=True) for v in lost)])
    return Table(["method", *(k + ("*" if k in unseen else "") for k in kinds)], cells)


def head_to_head(results: Results, ours: Row) -> Table:
    """Differences to every other row, paired by seed, each the mean over the tasks they share."""
    metrics = ("forgetting_seen", "forgetting_unseen", "nll", "acc")
    headings = [f"{ours.label} minus"]
    for metric in metrics:
        headings += [METRICS[metric].label, "p"]
    cells = []
    for other in results.rows:
        if other == ours or other.method == "base":
            continue
        row = [named_with_tasks(results, ours, other)]
        for metric in metrics:
            d = difference(results, metric, ours, other)
            row += [d.shown(METRICS[metric].digits), p_text(d.p)]
        cells.append(row)
    return Table(headings, cells)


def matched(results: Results, task: str) -> Table | None:
    """What is forgotten at shares of plain LoRA's gain on the task: no kind far and near pooled."""
    found = {
        (measure, group): of
        for measure, group in (("KL", "unseen"), ("loss", "unseen"), ("KL", "seen"))
        if (of := Matched.of(results, task, group, measure))
    }
    if not found:
        return None
    first = next(iter(found.values()))
    names = {"unseen": "far", "seen": "near"}
    headings = [
        f"{measure}, {names[group]}, at {share:.0%}"
        for measure, group in found for share in SHARES
    ]  # fmt: skip
    cells = [
        [LORA.label] + [_interval(estimate(m.plain())) for m in found.values() for _ in SHARES]
    ]
    for method in first.methods:
        least = [m.least(method, share) for m in found.values() for share in SHARES]
        shown_ = ["–" if d is None else _interval(estimate(d)) for d in least]
        cells.append([Row(method, None).label, *shown_])
    return Table(["method", *headings], cells)


def _interval(of: Estimate, sign: str = "") -> str:
    if not math.isfinite(of.value):
        return "not reached"
    return f"{of.value:{sign}.3f} [{of.low:{sign}.3f}, {of.high:{sign}.3f}]"


def contrasts(results: Results) -> Table | None:
    """The differences that were named beforehand, corrected for their number."""
    names, found = list[list[str]](), list[Estimate]()
    for task in results.tasks:
        of = Matched.of(results, task)
        for ours, other in CONTRASTS if of else []:
            a, b = (of.least(m, SHARES[0]) for m in (ours, other))
            if a is not None and b is not None:
                names.append([f"{METHODS[ours].label} minus {METHODS[other].label}", task])
                found.append(estimate(a - b))
    if not found:
        return None
    tested = [i for i, of in enumerate(found) if math.isfinite(of.p)]
    ps = dict(zip(tested, holm([found[i].p for i in tested]), strict=True))
    cells = [
        [*name, _interval(of, "+"), p_text(ps.get(i, math.nan)), "yes" if of.alike else "no"]
        for i, (name, of) in enumerate(zip(names, found, strict=True))
    ]
    alike = f"within ±{MARGIN:g}"
    return Table(["difference", "task", f"KL, far, at {SHARES[0]:.0%}", "p (Holm)", alike], cells)


def t_tests(results: Results, ours: Row, rival: Row) -> Table:
    """Fig. 3's tests, as the paper makes them: runs as independent samples, task by task."""
    headings = ["task, measure", ours.label, rival.label, "Welch p", "Student p", "Hedges' g", "n"]
    cells = []
    for task, metric in product(results.tasks, ("ppl_seen", "ppl_unseen", "nll", "acc")):
        a, b = (list(results.values(metric, r, task).values()) for r in (ours, rival))
        t, of = independent(a, b), METRICS[metric]
        samples = [shown(a, of.digits), shown(b, of.digits)]
        tests = [p_text(t.welch), p_text(t.student), "–" if t.g != t.g else f"{t.g:+.2f}"]
        cells.append([f"{task}, {of.label}", *samples, *tests, f"{t.n[0]}, {t.n[1]}"])
    return Table(headings, cells)


def cost(found: dict[str, Cost]) -> Table:
    """Fig. 5 as figures, with the paper's below."""
    cells = [
        [
            label, f"{c.seconds:,.0f} s" + (" (extrapolated)" if c.extrapolated else ""),
            f"{c.timed:,}" if c.timed else "–", size(c.bytes), str(c.seeds),
        ]
        for label, c in found.items()
    ]  # fmt: skip
    for model, rows in COST.items():
        for method, (hours, gigabytes) in rows.items():
            name = "EWC-LoRA" if method.startswith("ewc") else "HLoRA"
            cells.append(
                [f"the paper, {model}, {name}", f"{hours} h (A800)", "–", f"{gigabytes} GB", "–"]
            )
    return Table(["importance", "time", "sequences or steps timed", "on disk", "runs"], cells)


def verdicts(by_row: dict[Row, list[Verdict]]) -> Table:
    """Claims down, HLoRA's rows across."""
    cells = [
        [claims[0].claim, *(v.word for v in claims)]
        for claims in zip(*by_row.values(), strict=True)
        if any(v.word != MISSING for v in claims)
    ]
    return Table(["claim", *(r.label for r in by_row)], cells, prose=True)


def evidence(judged: list[Verdict]) -> Table:
    """The figures behind the verdicts on one row."""
    cells = [[v.claim, v.word, v.evidence] for v in judged if v.word != MISSING]
    return Table(["claim", "verdict", "difference ± standard error"], cells, prose=True)
