"""`hlora demo`: both phases on a small model, with a page to look at."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.table import Table as Shown

from hlora.cli.screen import Screen, say
from hlora.errors import InputError
from hlora.files import check_space, refuse_result
from hlora.run.models import pick_device
from hlora.run.quiet import quiet_libraries
from hlora.run.settings import DemoSettings
from hlora.study.demo import demo_study, note, refuse_another, summary, verdict, write_page
from hlora.study.figures import load_pyplot
from hlora.study.rows import Results, read
from hlora.study.runner import run_study

RESULTS, PAGE = "demo.jsonl", "report.html"
NEEDED = 300 << 20
"""Bytes on the disk: importance, adapters, a checkpoint or two."""


def run(settings: DemoSettings) -> None:
    """Run the demo's study, print its table, write its page."""
    load_pyplot()  # missing, it should be missed now and not after the training
    output = Path(settings.output)
    _refuse_finished(output, settings.overwrite)
    check_space(output, NEEDED)
    began = time.monotonic()
    study = demo_study(settings)
    pick_device(settings.device)
    if settings.overwrite:  # nothing is refused any more
        shutil.rmtree(output / "work", ignore_errors=True)
        for file in (RESULTS, PAGE):
            (output / file).unlink(missing_ok=True)
    if (output / RESULTS).exists():
        refuse_another(study, read(output / RESULTS, mixed=True))
    run_study(study, output / RESULTS, prepare=quiet_libraries)
    results = read(output / RESULTS, mixed=True)
    if results.failed:
        raise InputError(
            f"A run of the demo failed: {results.failed[0]['error']} Run it again to continue."
        )
    write_page(output / PAGE, study, results)
    _show(results)
    say(f"\nDone in {time.monotonic() - began:.0f} s. Open {output / PAGE} in a browser.")


def _refuse_finished(output: Path, overwrite: bool) -> None:
    refuse_result(output, overwrite=True)  # a demo is no result of one phase
    if not overwrite and (output / PAGE).exists():
        raise InputError(
            f"{output} holds a finished demo: look at {output / PAGE}, or start over with "
            "--overwrite."
        )


def _show(results: Results) -> None:
    table = summary(results)
    # On its side: five models fit into 80 columns, ten measures do not. Their names may wrap.
    heading, *lines = zip(table.headings, *table.rows, strict=True)
    shown = Shown(box=None, padding=(0, 0, 0, 1), pad_edge=False)
    for i, model in enumerate(heading):
        style = "bold" if model == table.strong else ""
        shown.add_column(
            model if i else "", justify="right" if i else "left", style=style, no_wrap=not i
        )
    for line in lines:
        shown.add_row(*(cell.replace(" ± ", " ±").replace("±0.", "±.") for cell in line))
    console = Screen(highlight=False)
    console.print(shown)
    console.print(note(results))
    console.print()
    console.print(verdict(results), style="bold")
