"""`hlora inspect`: what is in an importance folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hlora.cli.screen import Screen
from hlora.core import store
from hlora.core.layers import layer_grid
from hlora.errors import InputError
from hlora.files import size
from hlora.run.settings import InspectSettings


def run(settings: InspectSettings) -> None:
    """Print the settings, sizes and a heatmap of ‖Ω_l‖₂; with --plot draw it."""
    folder = Path(settings.folder)
    if settings.plot and Path(settings.plot).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {settings.plot}: name a .png, .svg or .pdf file.")
    info = store.load(folder).info
    console = Screen(highlight=False)
    base, recording = info["base_model"], info.get("recording") or {}
    lines = {
        "base model": base["name"] or "(unnamed)",
        "": ", ".join(f"{k} {v}" for k, v in base["config"].items()),
        "recorded": f"{info['created']} by hlora {info['hlora_version']}",
        "kind": f"{info['kind']}, " + ", ".join(f"{k} {v}" for k, v in recording.items()),
        "adapter": ", ".join(
            sorted({f"r {p['r']:g}, scaling {p['s']:g}" for p in info["pairs"].values()})
        ),
        "earlier": info.get("previous") or "none",
    }  # fmt: skip
    for name, value in lines.items():
        console.print(f"{name:<12}{value}")
    for name, file in info["files"].items():
        console.print(f"{size(file['bytes']):>10}  {name}")
    console.print(store.described(info, folder))
    for line in _heatmap(info["norms"]):
        console.print(line)
    if settings.plot:
        from hlora.study.figures import heatmap, save_figure

        save_figure(heatmap(info["norms"]), Path(settings.plot))
        console.print(f"Drawn to {settings.plot}.")


def _heatmap(norms: dict[str, float]) -> tuple[str, Table]:
    """log₁₀ ‖Ω_l‖₂ by block (columns) and target (rows), as shaded cells."""
    targets, blocks, values = layer_grid(norms)
    logs = [math.log10(v) for v in norms.values() if v > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    title = f"log₁₀ ‖Ω_l‖₂ by block, from {low:.1f} (dark) to {high:.1f} (bright)"
    table = Table(box=None, padding=0, pad_edge=False, show_header=False)
    for target, row in zip(targets, values, strict=True):
        cells = Text()
        for value in row:
            cells.append(*_cell(value, low, high))
        table.add_row(f"{target:<12}", cells)
    table.add_row("block", _ruler(blocks))
    return title, table


def _cell(value: float | None, low: float, high: float) -> tuple[str, str]:
    if value is None or value <= 0:
        return "· ", "dim"
    t = (math.log10(value) - low) / (high - low) if high > low else 0.5
    shade = "░▒▓█"[min(3, int(4 * t))]
    return shade * 2, f"color({232 + round(8 + 15 * t)})"


def _ruler(blocks: list[Any]) -> Text:
    marks = "".join(f"{b:<10}" if i % 5 == 0 else "" for i, b in enumerate(blocks))
    return Text(marks[: 2 * len(blocks) + 2])
