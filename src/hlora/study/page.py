"""The report of a study: one list of parts, as an HTML page and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from hlora.files import write_whole
from hlora.study import figures, tables
from hlora.study.claims import MISSING, Verdict, judge, mean_norms
from hlora.study.cost import costs
from hlora.study.lines import Line
from hlora.study.rows import Results, Row
from hlora.study.tables import Table

TITLE = "What a study of HLoRA found"


@dataclass(frozen=True)
class Part:
    """A heading, and what stands under it; figures are (file stem, figure, caption)."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: list[tuple[str, Any, str]] = field(default_factory=list)
    code: str = ""


def hlora_rows(results: Results) -> list[Row]:
    """The rows that the claims are judged for."""
    named = ("hlora", "hlora-factored", "hlora-paper", "hlora-official")
    return [r for r in results.rows if r.method in named]


def parts(
    results: Results, ours: Row | None, rival: Row | None, metrics: Sequence[str]
) -> list[Part]:
    """The whole report, without what the results cannot tell."""
    found = [
        Part("What was run", about(results)),
        Part("All tasks", "Means over tasks ± one standard error over seeds. NLL is that of the "
             "right answer, in nats; forgetting is loss on general text minus the base model's, "
             "nats per token: below zero, the text was learned.",
             tables.means(results, results.tasks, metrics)),
        *_claims(results, ours),
        Part(
            "Table 1, beside the paper's",
            "Perplexity (e to the nats) on text like ν's · on unseen kinds / accuracy in %. Ours "
            "are means over seeds; their spread is in the tables by task. The paper's are on Pile "
            "text and other models, converted from the 2 to the nats that it prints (in brackets): "
            "its order can be compared, not its level; its PIQA is chance (docs/paper.md).",
            tables.table_1(results),
        ),
        *(
            Part(f"{task}", "Mean ± one standard error over seeds.",
                 tables.means(results, [task], metrics))
            for task in results.tasks
        ),
        Part(
            "Forgetting by kind of text",
            "Loss minus the base model's, nats per token, the mean over tasks ± one standard error "
            "over seeds. Below zero, the text was learned. * in no phase ν.",
            tables.by_kind(results, [r for r in results.rows if r.method != "base"]),
            [("frontier", figures.frontier(results),
              "What the domain costs the rest, one panel a task: lower left is better. Lines join "
              "the values of φ of one method.")],
        ),
    ]  # fmt: skip
    ablation = tables.table_2(results)
    if ablation:
        found.append(
            Part("Table 2, the ablation", "As in Table 1. Without layer and element it is "
                 "LoRA(ν+μ).", ablation)
        )  # fmt: skip
    if ours:
        found.append(
            Part(f"{ours.label} against every other row",
                 "Differences seed by seed, each the mean over tasks (those in brackets, where not "
                 "all were run), ± one standard error; p of a t-test against zero. Negative is "
                 "better, but for accuracy.",
                 tables.head_to_head(results, ours))
        )  # fmt: skip
    if ours and rival:
        n = len(results.seeds)
        found.append(
            Part("Fig. 3: independent samples",
                 f"{ours.label} and {rival.label}, {n} seed{'s' * (n != 1)} each"
                 + (": too few for a violin's shape to mean much, so every run is a point."
                    if n < 10 else "."),
                 tables.t_tests(results, ours, rival),
                 [("fig3", figures.violins(results, ours, rival),
                   "Perplexity and accuracy over seeds, with the p of Welch's t-test.")])
        )  # fmt: skip
    if ours and results.of(ours):
        found.append(
            Part("Fig. 4: losses in phase μ", figures=[
                ("fig4", figures.losses(results, ours), f"{ours.label}, the mean over seeds.")])
        )  # fmt: skip
    priced = costs(results)
    if priced:
        found.append(
            Part("Fig. 5: the cost of the importance",
                 "HLoRA's time is its whole phase ν; what recording adds to it is in docs/cost.md. "
                 "Hatched: extrapolated.",
                 tables.cost(priced), [("fig5", figures.cost_bars(priced), "Log scales.")])
        )  # fmt: skip
    swept = figures.phi_curves(results)
    if swept is not None:
        found.append(
            Part("Fig. 6: φ", figures=[
                ("fig6", swept, "Means over tasks, ± one standard error over seeds.")])
        )  # fmt: skip
    norms = mean_norms(results, ours) if ours else {}
    if norms and ours:
        found.append(
            Part("Fig. 7: where the importance sits", figures=[
                ("fig7", figures.heatmap(norms),
                 f"‖Ω‖₂ by block, {ours.label}, the mean over seeds.")])
        )  # fmt: skip
    return found


def about(results: Results) -> str:
    """Model, data, sizes, versions and machines: what stands behind the figures."""
    line = next((r for r in results.lines if r.get("settings", {}).get("tune")), results.lines[0])
    study, n = line["study"], results.seeds
    trained = line.get("settings", {})
    said = [
        f"{len(results.lines)} runs of {study['model']}: {len(results.rows)} rows × "
        f"{len(results.tasks)} tasks ({', '.join(results.tasks)}) × "
        f"{len(n)} seed{'s' * (len(n) != 1)}.",
        f"General text: {', '.join(line['seen'])}; unseen: {', '.join(line['unseen']) or 'none'}.",
    ]
    if trained:
        nu, mu = trained["record"], trained["tune"]
        said.append(
            f"Phase ν: at most {nu['max_steps'] or 'all'} steps of {nu['batch_size']} × "
            f"{nu['block_size']} tokens; phase μ: {line['steps']} steps of "
            f"{mu['batch_size']} rows; r {mu['lora_rank']}, α {mu['lora_alpha']:g}, "
            f"learning rate {mu['learning_rate']:g}, {mu['dtype']}."
        )
    text = next(iter(line["text"].values()))
    said.append(
        f"Scored on {line['task']['n']} questions (±"
        f"{100 * line['task']['acc_se']:.0f} points of accuracy from these alone) and "
        f"{text['tokens']:,} tokens of each kind of text (forgetting: ±{_text_error(results):.3f} "
        "from these alone)."
    )
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items() if v)
    machines = sorted({_machine(r) for r in results.lines})
    said.append(f"{versions}; {' and '.join(machines)}.")
    if len(n) == 1:
        said.append(f"ONE SEED ({n[0]}): no spread is known.")
    if results.failed:
        first = results.failed[0]
        said.append(f"{len(results.failed)} runs failed, the first with: {first['error']}")
    missing = _incomplete(results)
    if missing:
        said.append(missing)
    if results.mixed:
        said.append(f"MIXED: {'; '.join(results.mixed)}.")
    return " ".join(said)


def _text_error(results: Results) -> float:
    """The usual standard error of one run's forgetting, over its blocks of text."""
    group = "unseen" if results.lines[0]["unseen"] else "seen"
    errors = [r["forgetting"][group]["se"] for r in results.lines if r.get("settings")]
    return statistics.median(errors) if errors else 0.0


def _machine(line: Line) -> str:
    of = line.get("machine", {})
    return f"{of.get('device', 'unknown')}, CPU threads a run: {of.get('threads', '?')}"


def _incomplete(results: Results) -> str:
    """Rows that lack seeds on some task."""
    short = [
        row.label for row in results.rows
        if any(len(results.of(row, t)) < len(results.seeds) for t in results.tasks)
    ]  # fmt: skip
    return f"Not on every task with every seed: {', '.join(short)}." if short else ""


def _claims(results: Results, ours: Row | None) -> list[Part]:
    rows = hlora_rows(results)
    if not rows:
        return []
    by_row = {row: judge(results, row) for row in rows}
    found = [
        Part(
            "The paper's claims",
            "A claim holds or does not where a t-test over seeds (paired, the mean over tasks) "
            "decides it at the 5 % level; several rivals are counted one by one. Seeds share their "
            "questions and their text, whose own errors are above. Where nothing is decided, more "
            "seeds would be needed.",
            tables.verdicts(by_row),
        )
    ]
    if ours in by_row:
        found.append(Part(f"The figures behind them: {ours.label}", table=_evidence(by_row[ours])))
    return found


def _evidence(verdicts: list[Verdict]) -> Table:
    cells = [[v.claim, v.word, v.evidence] for v in verdicts if v.word != MISSING]
    return Table(["claim", "verdict", "difference ± standard error"], cells, prose=True)


def write(
    found: list[Part], index: Path, *, title: str = TITLE, lead: str = "", command: str = "",
    page: Path | None = None,
) -> list[Path]:  # fmt: skip
    """A self-contained HTML page with the figures beside it, and a Markdown page too.

    Args:
        index: the HTML file.
        command: what made it, for the Markdown page's head.
        page: the Markdown file; the figures then lie in a folder beside it.

    Returns:
        What was written.
    """
    drawn = index.parent if page is None else page.with_suffix("")
    svgs = {
        stem: figures.save_both(figure, drawn / stem)
        for part in found
        for stem, figure, _ in part.figures
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("hlora.study").joinpath("report.html").read_text(encoding="utf-8")
    )
    write_whole(index, template.render(title=title, lead=lead, parts=found, svgs=svgs))
    if page is None:
        return [index]
    write_whole(page, _markdown(found, title, drawn.name, command))
    return [index, page]


def _markdown(found: list[Part], title: str, folder: str, command: str) -> str:
    lines = [f"# {title}", "", "Written by", "", "```bash", command, "```"]
    for part in found:
        if part.code:
            continue
        lines += ["", f"## {part.title}", ""]
        if part.text:
            lines += [part.text, ""]
        if part.table:
            lines += [*part.table.markdown(), ""]
        for stem, _, caption in part.figures:
            lines += [f"![{caption}]({folder}/{stem}.svg)", "", caption, ""]
    return "\n".join(lines).rstrip() + "\n"
