"""`hlora demo`: the whole story on a small model, with a page to look at."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table as Shown

from hlora.errors import InputError
from hlora.files import check_space, write_json
from hlora.run.progress import quiet_libraries
from hlora.run.settings import DemoSettings
from hlora.study.demo_page import forgetting_figure, note, results_table, verdict, write_page
from hlora.study.demo_story import run_story
from hlora.study.plots import load_pyplot, save_figure

RESULTS, PAGE, FIGURE = "demo.json", "report.html", "forgetting.svg"
STEPS = 6
NEEDED = 300 << 20
"""Bytes on the disk: importance, adapters, a checkpoint or two."""


def run(settings: DemoSettings) -> None:
    """Train, score, print the table, write the page."""
    quiet_libraries()
    load_pyplot()  # missing, it should be missed now and not after the training
    output = Path(settings.output)
    _make_room(output, settings.overwrite)
    check_space(output, NEEDED)
    began, step = time.monotonic(), 0

    def say(what: str) -> None:
        nonlocal step
        step += 1
        print(f"\n[{step}/{STEPS}, {time.monotonic() - began:.0f} s] {what}", flush=True)

    results = run_story(settings, say)
    write_json(output / RESULTS, results)
    write_page(output / PAGE, results)
    save_figure(forgetting_figure(results), output / FIGURE)
    _show(results)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open {output / PAGE} in a browser.")


def _make_room(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"The output {output} is a file: name a folder.")
    if overwrite:
        for folder in ("nu", "lora-mu", "lora-nu-mu", "hlora", "data"):
            shutil.rmtree(output / folder, ignore_errors=True)
        for file in (RESULTS, PAGE, FIGURE):
            (output / file).unlink(missing_ok=True)
    elif (output / RESULTS).exists():
        raise InputError(
            f"{output} holds a finished demo: look at {output / PAGE}, or start anew with "
            "--overwrite."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} cannot be written to ({error.strerror}).") from None


def _show(results: dict) -> None:
    table = results_table(results)
    # On its side: five models fit into 80 columns, ten measures do not.
    heading, *lines = zip(table.headings, *table.rows, strict=True)
    shown = Shown(box=None, padding=(0, 0, 0, 1), pad_edge=False)
    for i, model in enumerate(heading):
        style = "bold" if model == table.strong else ""
        shown.add_column(model if i else "", justify="right" if i else "left", style=style)
    for line in lines:
        shown.add_row(*(cell.replace(" ± ", " ±").replace("±0.", "±.") for cell in line))
    console = Console(highlight=False)
    console.print(shown)
    console.print(note(results))
    console.print()
    console.print(verdict(results), style="bold")
