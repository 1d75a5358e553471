"""`hlora report`: tables and figures of a study."""

from __future__ import annotations

from pathlib import Path

from hlora.cli.screen import say
from hlora.cli.show import show
from hlora.errors import InputError, refuse_unknown
from hlora.run.build import command_line
from hlora.run.settings import USUAL_METRICS, ReportSettings
from hlora.study import page, tables
from hlora.study.metrics import METRICS
from hlora.study.rows import Results, Row, read

DEFAULT_PHI = 0.01
"""Of several values, the one nearest to the default of `hlora tune` is compared."""


def run(settings: ReportSettings) -> None:
    """Write the page and print where, with the first table."""
    refuse_unknown(settings.metrics, METRICS, "--metrics: unknown metric")
    source = Path(settings.results)
    results = read(source, settings.where, mixed=settings.mixed, apart=settings.apart)
    if len(settings.compare) != 2:
        raise InputError("--compare takes two rows, such as: --compare hlora@0.003 ewc@0.003")
    usual = settings.compare == ReportSettings(results="").compare
    ours, rival = (_row(results, r, optional=usual) for r in settings.compare)
    folder = Path(settings.output or source.with_name(f"{source.stem}-report"))
    found = page.parts(results, ours, rival, settings.metrics)
    command = command_line("report", settings)
    found.append(page.Part("How this was made", code=command))
    markdown = Path(settings.page) if settings.page else None
    written = page.write(found, folder / "index.html", command=command, page=markdown)
    say(page.about(results))
    shown = {task: [task] for task in results.tasks}
    if len(shown) > 1:
        shown["all tasks"] = results.tasks
    metrics = settings.metrics
    if metrics == list(USUAL_METRICS):
        # Forgetting says the same as perplexity, and a screen is narrower than a page.
        metrics = [m for m in metrics if not m.startswith("ppl")]
    for title, tasks in shown.items():
        table = tables.means(results, tasks, metrics)
        show(title, table.headings, table.rows, width=150)
    say(f"Written: {', '.join(map(str, written))}")


def _row(results: Results, text: str, *, optional: bool) -> Row | None:
    """METHOD or METHOD@PHI among the rows that there are."""
    method, _, phi = text.partition("@")
    rows = [r for r in results.rows if r.method == method]
    if not rows:
        if optional:
            return None
        refuse_unknown([method], [r.method for r in results.rows], "--compare: no run of")
    if not phi:
        return min(rows, key=lambda r: abs((r.phi or 0.0) - DEFAULT_PHI))
    by_phi = {f"{r.phi:g}": r for r in rows if r.phi is not None}
    if phi not in by_phi:
        there = ", ".join(by_phi) or "none"
        raise InputError(f"--compare: {method} was not run with φ {phi}; there are {there}.")
    return by_phi[phi]
