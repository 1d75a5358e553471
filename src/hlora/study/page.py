"""The report of a study: one list of parts, as an HTML page and as Markdown."""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from unicodedata import normalize

import jinja2

from hlora.data.parse import packaged
from hlora.errors import visible
from hlora.files import write_whole
from hlora.run.settings import BLOCK
from hlora.study import figures, tables
from hlora.study.alternatives import in_words
from hlora.study.budgets import budgets
from hlora.study.cells import Table, as_markdown
from hlora.study.claims import JUDGED, judge, mean_norms
from hlora.study.cost import costs
from hlora.study.paper import TABLE_1, TABLE_2, TASKS
from hlora.study.rows import Results, Row
from hlora.study.tables import ABLATION, ACCURACY, PERPLEXITY

_SAID = packaged("study", "page.yaml")
TITLE: str = _SAID["title"]
FEW = 6
"""Rows that are named where they lack runs; more are counted."""
_THEMED = {
    "#000000": "currentColor",
    **{color: f"var(--c{color[1:]}, {color})" for color in ("#ffffff", *figures.COLORS)},
}
"""The colors of a figure that a dark page changes, by what its style sheet calls them."""


@dataclass(frozen=True)
class Part:
    """A heading, and what stands under it; figures are (file stem, figure, caption).

    Attributes:
        name: of its anchor and its CSV file; by default made of the title.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figures: list[tuple[str, Any, str]] = field(default_factory=list)
    code: str = ""
    name: str = ""


def parts(
    results: Results, ours: Row | None, rival: Row | None, metrics: Sequence[str]
) -> list[Part]:
    """The whole report, without what the results cannot tell."""
    found: list[Part] = []

    def add(name: str, table: Table | None = None, figure: Any = None, **named: str) -> None:
        said = {k: v.format(**named) for k, v in _SAID[name].items() if isinstance(v, str)}
        drawn = [] if figure is None else [(name, figure, said["caption"])]
        at = f"{name}-{named['task']}" if "task" in named else name
        found.append(Part(said["title"], said.get("text", ""), table, drawn, name=at))

    def beside(name: str, rows: Sequence[Row], paper: dict) -> None:
        if not set(TASKS) & set(results.tasks):
            return
        for at, metrics in ((name, PERPLEXITY), (f"{name}_acc", ACCURACY)):
            add(at, tables.beside_the_paper(results, rows, paper, metrics))

    add("run", about=about(results))
    if len(results.tasks) > 1:
        add("means", tables.means(results, results.tasks, metrics))
    by_row = {r: judge(results, r) for r in results.rows if r.method in JUDGED}
    if by_row:
        add("claims", tables.verdicts(by_row))
    if ours in by_row:
        add("evidence", tables.evidence(by_row[ours]), ours=ours.label)
    beside("table_1", results.rows, TABLE_1)
    for task in results.tasks:
        add("task", tables.means(results, [task], metrics), task=task)
        if at := tables.matched(results, task):
            add("matched", at, task=task)
        if at := tables.others(results, task):
            add("others", at, task=task)
    if named := tables.contrasts(results):
        missing = "; ".join(tables.not_run(results)) or "none"
        add("contrasts", named, missing=missing)
    if kept := budgets(results):
        add("budgets", kept)
    adapted = [r for r in results.rows if r.method != "base"]
    add("frontier", tables.by_kind(results, adapted), figures.frontier(results))
    if ablation := [r for m in ABLATION for r in results.rows if r.method == m]:
        beside("table_2", ablation, TABLE_2)
    if ours:
        add("against", tables.head_to_head(results, ours), ours=ours.label)
    if ours and rival:
        n = len(results.seeds)
        few = ": too few for a violin's shape to mean much, so every run is a point"
        add(
            "fig3", tables.t_tests(results, ours, rival), figures.violins(results, ours, rival),
            ours=ours.label, rival=rival.label, seeds=f"{n} seed{'s' * (n != 1)}",
            few=few * (n < 10),
        )  # fmt: skip
    if ours and results.of(ours):
        add("fig4", figure=figures.losses(results, ours), ours=ours.label)
    if priced := costs(results):
        add("fig5", tables.cost(priced), figures.cost_bars(priced))
    if swept := figures.phi_curves(results):
        add("fig6", figure=swept)
    if ours and (norms := mean_norms(results, ours)):
        add("fig7", figure=figures.heatmap(norms), ours=ours.label)
    words = _SAID["symbols"]["rows"]
    add("symbols", Table(["symbol", "in words"], [[k, v] for k, v in words.items()]))
    return found


def about(results: Results) -> str:
    """Model, data, sizes, versions and machines: what stands behind the figures."""
    tuned = [r for r in results.lines if r.get("settings", {}).get("tune")]
    recorded = [r for r in tuned if r["settings"]["record"]]
    line = [*recorded, *tuned, results.lines[0]][0]
    study, n = line["study"], results.seeds
    trained = line.get("settings", {})
    said = [
        f"{len(results.lines)} runs of {study['model']}: {len(results.rows)} rows × "
        f"{len(results.tasks)} tasks ({', '.join(results.tasks)}) × "
        f"{len(n)} seed{'s' * (len(n) != 1)}.",
        f"General text: {', '.join(line['seen'])}; unseen: {', '.join(line['unseen']) or 'none'}"
        + "".join(f"; apart from both: {k}" for k in line.get("apart", []))
        + ".",
    ]
    if trained.get("tune"):
        nu, mu = trained["record"], trained["tune"]
        general = "" if nu is None else (
            f"General phase (ν): at most {nu['max_steps'] or 'all'} steps of {nu['batch_size']} × "
            f"{nu['block_size'] or BLOCK} tokens; "
        )  # fmt: skip
        said.append(
            f"{general}{'domain' if general else 'Domain'} phase (μ): {line['steps']} steps of "
            f"{mu['batch_size']} rows; r {mu['lora_rank']}, α {mu['lora_alpha']:g}, "
            f"learning rate {mu['learning_rate']:g}, {mu['dtype']}."
        )
    tokens = sorted({t["tokens"] for t in line["text"].values()})
    many = " to ".join(f"{n:,}" for n in dict.fromkeys((tokens[0], tokens[-1])))
    said.append(
        f"Scored on {line['task']['n']} questions (±"
        f"{100 * line['task']['acc_se']:.0f} points of accuracy from these alone) and "
        f"{many} tokens of each kind of text (forgetting: ±{_text_error(results):.3f} "
        "from these alone)."
    )
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items() if v)
    used = (r.get("machine", {}) for r in results.lines)
    machines = {
        f"{m.get('device', 'unknown')}, CPU threads a run: {m.get('threads', '?')}" for m in used
    }
    said.append(f"{versions}; {' and '.join(sorted(machines))}.")
    if len(n) == 1:
        said.append(f"ONE SEED ({n[0]}): no spread is known.")
    if results.failed:
        first = results.failed[0]
        said.append(f"{len(results.failed)} runs failed, the first with: {first['error']}")
    short = [
        row.label for row in results.rows
        if any(len(results.of(row, t)) < len(results.seeds) for t in results.tasks)
    ]  # fmt: skip
    if len(short) > FEW:
        seeds = "; ".join(f"{t} {', '.join(map(str, results.seeds_of(t)))}" for t in results.tasks)
        said.append(
            f"Seeds by task: {seeds}; {len(short)} of {len(results.rows)} rows were not run on "
            "every task with every seed, as the tables say."
        )
    elif short:
        said.append(f"Not on every task with every seed: {', '.join(short)}.")
    if results.mixed:
        said.append(f"MIXED: {'; '.join(results.mixed)}.")
    return " ".join(said)


def _text_error(results: Results) -> float:
    """The usual standard error of one run's forgetting, over its blocks of text."""
    group = "unseen" if results.lines[0]["unseen"] else "seen"
    errors = [r["forgetting"][group]["se"] for r in results.lines if r.get("settings")]
    return statistics.median(errors) if errors else 0.0


def write(
    found: list[Part], index: Path, *, title: str = TITLE, lead: str = "", command: str = "",
    page: Path | None = None,
) -> list[Path]:  # fmt: skip
    """An HTML page that needs no other file, and a Markdown page too.

    Beside the HTML page lie the figures, and every table as `tables/NAME.csv`.

    Args:
        command: what made it, for the Markdown page's head.
        page: the Markdown file; the figures then lie in a folder beside it.
    """
    drawn = index.parent if page is None else page.with_suffix("")
    shown = {stem: figure for part in found for stem, figure, _ in part.figures}
    words = {stem: in_words(figure) for stem, figure in shown.items()}
    svgs = {stem: _themed(figures.save_both(f, drawn / stem)) for stem, f in shown.items()}
    anchors = _anchors(found)
    for name, part in zip(anchors, found, strict=True):
        if part.table:
            write_whole(index.parent / "tables" / f"{name}.csv", part.table.csv())
    command = visible(command).replace("\n", "\\n")
    script = files("hlora.study").joinpath("report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    said = {
        "title": title, "lead": lead, "command": command, "svgs": svgs, "words": words,
        "parts": list(zip(anchors, found, strict=True)),
        "folder": drawn.name, "script": script, "digest": digest,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0)),
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hlora.study", ""), trim_blocks=True, lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(["html.jinja"]),
    )  # fmt: skip
    environment.filters["markdown"] = as_markdown
    written = {index: "html", **({page: "md"} if page else {})}
    for path, form in written.items():
        text = environment.get_template(f"report.{form}.jinja").render(said)
        write_whole(path, text.rstrip() + "\n")
    return list(written)


def _anchors(found: list[Part]) -> list[str]:
    """A name for each part, in letters that a link and a file can have."""
    names: list[str] = []
    for part in found:
        text = normalize("NFKD", part.name or part.title).encode("ascii", "ignore").decode()
        name = base = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "part"
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _themed(svg: str) -> str:
    """A figure whose colors follow the page's, light or dark."""
    svg = re.sub(
        r'\bfill="(#[0-9a-f]{6})"', r'style="fill: \1"', svg
    )  # an attribute takes no var()
    svg = re.sub("(?<=: )#[0-9a-f]{6}", lambda of: _THEMED.get(of[0], of[0]), svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
