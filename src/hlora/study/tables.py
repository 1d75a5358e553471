"""The paper's tables, and ours, from the runs of a study."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product

from hlora.run.means import mean_se
from hlora.study.cells import Table
from hlora.study.claims import MISSING, Verdict, difference, named_with_tasks
from hlora.study.cost import Cost
from hlora.study.lines import kinds_of
from hlora.study.matched import (
    CONTRASTS,
    LATER,
    LORA,
    MARGIN,
    SHARES,
    Estimate,
    Matched,
    estimate,
    holm,
)
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS
from hlora.study.paper import COST, TASKS, e_perplexity
from hlora.study.rows import Results, Row
from hlora.study.stats import independent, p_text, shown


def no_rivals(results: Results, tasks: Sequence[str]) -> frozenset[str]:
    """The labels of the base model, and of what has fewer runs on these tasks than another."""
    runs = {r.label: sum(len(results.of(r, t)) for t in tasks) for r in results.rows}
    base = METHODS["base"].label
    most = max((n for label, n in runs.items() if label != base), default=0)
    return frozenset({base, *(label for label, n in runs.items() if n < most)})


PAPER_NAMES = {"ewc-original": "ewc"}
"""Where the paper has one row for what is two methods here."""

ABLATION = (
    "hlora", "hlora-no-layer", "hlora-paper", "hlora-paper-no-layer", "hlora-official",
    "hlora-official-no-layer", "l2", "lora-nu-mu",
)  # fmt: skip


PERPLEXITY, ACCURACY = ("ppl_seen", "ppl_unseen"), ("acc",)
"""What Tables 1 and 2 are made of."""


def beside_the_paper(
    results: Results, rows: Sequence[Row], paper: dict, metrics: Sequence[str]
) -> Table:
    """Perplexity or accuracy by task: ours, then the paper's, of the tasks that both have.

    The paper's perplexities, 2 to the nats, are converted to e to the nats.
    """
    shared = [t for t in results.tasks if t in TASKS]
    ours = list(product(shared, metrics))
    headings = ["method", *(f"{t}, {METRICS[m].label}" for t, m in ours)]
    headings += [f"{model.rsplit('-', 1)[0]}, {task}" for model in paper for task in shared]
    cells = []
    for row in rows:
        if not any(results.of(row, t) for t in shared):
            continue
        found = (results.values(m, row, t).values() for t, m in ours)
        cells.append([row.label, *(_mean(v, METRICS[metrics[0]].digits) for v in found)])
        for scores in paper.values():
            of = scores.get(PAPER_NAMES.get(row.method, row.method))
            by_task = dict(zip(TASKS, of or (), strict=False))
            told = [by_task.get(t) for t in shared]
            cells[-1] += [
                "–" if s is None else f"{s[1]:.1f}" if metrics == ACCURACY
                else f"{e_perplexity(s[0]):.2f}"
                for s in told
            ]  # fmt: skip
    best = {i: of for i, (_, m) in enumerate(ours, 1) if (of := METRICS[m].best)}
    return Table(headings, cells, best=best, apart=no_rivals(results, shared))


def _mean(values: Collection[float], digits: int) -> str:
    return f"{mean_se(values)[0]:.{digits}f}" if values else "–"


def means(results: Results, tasks: Sequence[str], metrics: Sequence[str]) -> Table:
    """The methods that have all these tasks: means over them ± standard error over seeds.

    What no run measured is left out, and where there are several tasks, what no mean over them says
    anything of.
    """
    metrics = [
        m for m in metrics
        if (len(tasks) == 1 or METRICS[m].pooled)
        and any(results.values(m, r, *tasks) for r in results.rows)
    ]  # fmt: skip
    cells = []
    for row in results.rows:
        if not all(results.of(row, t) for t in tasks):
            continue
        found = {m: results.values(m, row, *tasks) for m in metrics}
        seeds = str(len(results.whole(row, *tasks)))
        cells.append([row.label, *(_shown(m, v) for m, v in found.items()), seeds])
    best = {i: of for i, m in enumerate(metrics, 1) if (of := METRICS[m].best)}
    headings = ["method", *(METRICS[m].label for m in metrics), "seeds"]
    return Table(headings, cells, best=best, apart=no_rivals(results, tasks))


def _shown(metric: str, values: dict[int, float]) -> str:
    return shown(values.values(), METRICS[metric].digits, METRICS[metric].signed)


def by_kind(results: Results, rows: Sequence[Row]) -> Table | None:
    """Forgetting on each kind of text, the mean over tasks; unseen kinds carry a star,
    those apart a dagger.

    None where no row has all tasks.
    """
    kinds = results.lines[0]["text"]
    groups = (("unseen", "*"), ("apart", "†"))
    marks = {k: mark for group, mark in groups for k in kinds_of(results.lines[0], group)}
    cells = []
    for row in rows:
        lost = [results.values(f"forgetting_{k}", row, *results.tasks).values() for k in kinds]
        if any(lost):
            cells.append([row.label, *(shown(v, 3, signed=True) for v in lost)])
    if not cells:
        return None
    headings = ["method", *(k + marks.get(k, "") for k in kinds)]
    best = dict.fromkeys(range(1, len(headings)), min)
    return Table(headings, cells, best=best, apart=no_rivals(results, results.tasks))


def others(results: Results, task: str) -> Table | None:
    """The tasks that were not trained on; None where none was scored."""
    names = list(dict.fromkeys(n for r in results.lines for n in r.get("others", {})))
    cells = []
    for row in results.rows:
        shown_ = []
        for name in names:
            accuracies = [100 * v for v in results.values(f"acc_{name}", row, task).values()]
            losses = results.values(f"nll_{name}", row, task).values()
            shown_ += [shown(accuracies, 1), shown(losses, 2)]
        if any(of != "–" for of in shown_):
            cells.append([row.label, *shown_])
    if not cells:
        return None
    best = {i: max if i % 2 else min for i in range(1, 2 * len(names) + 1)}
    headings = ["method", *(f"{name}, {of}" for name in names for of in ("accuracy %", "NLL"))]
    return Table(headings, cells, best=best, apart=no_rivals(results, [task]))


def head_to_head(results: Results, ours: Row) -> Table:
    """Differences to every other row, paired by seed, each the mean over the tasks they share.

    Of the NLL, task by task.
    """
    columns = [
        (metric, task)
        for metric in ("forgetting_seen", "forgetting_unseen", "nll", "acc")
        for task in ([None] if METRICS[metric].pooled else results.tasks)
    ]
    headings = [f"{ours.label} minus"]
    for metric, task in columns:
        headings += [METRICS[metric].label + (f", {task}" if task else ""), "p"]
    cells = []
    for other in results.rows:
        if other == ours or other.method == "base":
            continue
        row = [named_with_tasks(results, ours, other)]
        for metric, task in columns:
            d = difference(results, metric, ours, other, task)
            row += [d.shown(METRICS[metric].digits), p_text(d.p)]
        cells.append(row)
    return Table(headings, cells)


GROUPS = {"unseen": "far", "seen": "near", "apart": "apart"}
"""Kinds of text, as the tables of what is forgotten for what is learned call them."""
MATCHED = (("KL", "unseen"), ("loss", "unseen"), ("KL", "seen"), ("KL", "apart"))
"""What those tables hold."""


def matched(results: Results, task: str) -> Table | None:
    """What is forgotten at shares of plain LoRA's gain on the task: no kind far and near pooled."""
    found = {
        (measure, group): of
        for measure, group in MATCHED if (of := Matched.of(results, task, group, measure))
    }  # fmt: skip
    if not found:
        return None
    first = next(iter(found.values()))
    headings = [
        f"{measure}, {GROUPS[group]}, at {share:.0%}"
        for measure, group in found for share in SHARES
    ]  # fmt: skip
    cells, fewer = [], set()
    plain = [_interval(estimate(m.plain())) for m in found.values() for _ in SHARES]
    cells.append([LORA.label, *plain, str(len(results.of(LORA, task)))])
    for method in first.methods:
        label, seeds = Row(method, None).label, first.seeds(method)
        if seeds:
            told = [_at(m, method, share) for m in found.values() for share in SHARES]
            cells.append([label, *told, str(len(seeds))])
        if len(seeds) < len(results.of(LORA, task)):
            fewer.add(label)
    best = dict.fromkeys(range(1, len(headings) + 1), min)
    return Table(["method", *headings, "seeds"], cells, best=best, apart=frozenset(fewer))


def _at(of: Matched, method: str, share: float) -> str:
    """Over the seeds that tell it; of how many, where others do not."""
    seeds = of.seeds(method)
    told = [s for s in seeds if of.told(s, share, method)]
    if not told:
        return "–"
    bound = "≤ " * of.bounded(method, share, told)
    some = f" ({len(told)} of {len(seeds)})" if len(told) < len(seeds) else ""
    return bound + _interval(estimate(of.least(method, share, told))) + some


def _interval(of: Estimate, sign: str = "") -> str:
    return f"{of.value:{sign}.3f} [{of.low:{sign}.3f}, {of.high:{sign}.3f}]"


def contrasts(results: Results) -> Table | None:
    """The differences that were named beforehand (or *later), corrected for their number."""
    names, found = list[list[str]](), list[Estimate]()
    for task in results.tasks:
        of = Matched.of(results, task)
        for ours, other in [*CONTRASTS, *LATER] if of else []:
            for share in SHARES:
                if seeds := [s for s in of.seeds(ours, other) if of.read(s, share, ours, other)]:
                    a, b = (of.least(m, share, seeds) for m in (ours, other))
                    mark = "*" if [ours, other] in LATER else ""
                    name = f"{METHODS[ours].label} minus {METHODS[other].label}{mark}"
                    names.append(
                        [name, task, f"{share:.0%}", str(len(seeds)), f"{a[0] / b[0]:.2f}"]
                    )
                    found.append(estimate(a - b))
    if not found:
        return None
    ps = holm([of.p for of in found])
    cells = [
        [*name, _interval(of, "+"), p_text(p), "yes" if of.alike else "no"]
        for name, of, p in zip(names, found, ps, strict=True)
    ]
    headings = ["difference", "task", "gain", "seeds", "ratio", "KL, far", "p (Holm)"]
    return Table([*headings, f"within ±{MARGIN:g}"], cells)


def not_run(results: Results) -> list[str]:
    """The contrasts that were named, and that no task has the runs of."""
    ran = {r.method for r in results.rows}
    return [
        f"{METHODS[a].label} minus {METHODS[b].label}"
        for a, b in [*CONTRASTS, *LATER] if not {a, b} <= ran
    ]  # fmt: skip


def t_tests(results: Results, ours: Row, rival: Row) -> Table:
    """Fig. 3's tests, as the paper makes them: runs as independent samples, task by task."""
    headings = ["task, measure", ours.label, rival.label, "Welch p", "Student p", "Hedges' g"]
    headings += [f"seeds, {r.label}" for r in (ours, rival)]
    cells = []
    for task, metric in product(results.tasks, ("ppl_seen", "ppl_unseen", "nll", "acc")):
        a, b = (list(results.values(metric, r, task).values()) for r in (ours, rival))
        t, of = independent(a, b), METRICS[metric]
        samples = [shown(a, of.digits), shown(b, of.digits)]
        tests = [p_text(t.welch), p_text(t.student), "–" if t.g != t.g else f"{t.g:+.2f}"]
        cells.append([f"{task}, {of.label}", *samples, *tests, *map(str, t.n)])
    return Table(headings, cells)


def cost(found: dict[str, Cost]) -> Table:
    """Fig. 5 as figures, with the paper's below."""
    cells = [
        [
            label, f"{c.seconds:,.0f}", "extrapolated" if c.extrapolated else "measured",
            f"{c.timed:,}" if c.timed else "–", f"{c.bytes / 2**20:,.4g}", str(c.seeds),
        ]
        for label, c in found.items()
    ]  # fmt: skip
    for model, rows in COST.items():
        for method, (hours, gigabytes) in rows.items():
            name = "EWC-LoRA" if method.startswith("ewc") else "HLoRA"
            seconds, size = f"{3600 * hours:,.0f}", f"{gigabytes * 1e9 / 2**20:,.0f}"
            cells.append(
                [f"the paper, {model}, {name}", seconds, "the paper, A800", "–", size, "–"]
            )
    headings = ["importance", "seconds", "from", "sequences or steps timed", "MiB on disk", "runs"]
    return Table(headings, cells)


def verdicts(by_row: dict[Row, list[Verdict]]) -> Table:
    """Claims down, HLoRA's rows across."""
    cells = [
        [claims[0].claim, *(v.word for v in claims)]
        for claims in zip(*by_row.values(), strict=True)
        if any(v.word != MISSING for v in claims)
    ]
    return Table(["claim", *(r.label for r in by_row)], cells)


def evidence(judged: list[Verdict]) -> Table:
    """The figures behind the verdicts on one row, a comparison a row."""
    cells = [[v.claim, *said] for v in judged if v.word != MISSING for said in v.evidence]
    return Table(["claim", "compared with", "difference ± standard error", "p", "verdict"], cells)
