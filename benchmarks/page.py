"""docs/cost.md and its plot, from what the benchmarks wrote.

python -m benchmarks.page
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hlora.files import size, write_whole

INTRO = """# What it costs

Made by `make bench` on {device} (torch {torch}, Python {python}, hlora {hlora}).
Milliseconds are medians. A row's peers are the plain LoRA step, and the same addition in plain
torch, of the same run. "Kept" is what stays in memory. The penalty in plain torch keeps θ^ν as a
dense matrix beside Ω; ours keeps its thin factors, and multiplies 2r columns for it where the other
multiplies r: at a high rank on a CPU it can be the slower of the two.

## Added to a LoRA step
"""

IMPORTANCE = """
## To get an importance

{steps}. A few steps and sequences were timed and scaled. "EWC-LoRA, as published" takes all
parameters, one sequence at a time, and copies each gradient to the CPU; "lean" is ours
(`--kind fisher`): target matrices only, whole batches, labels sampled from the model.
"""

LIMITS = """
## What is not measured here

{limits}
"""


def page(step: dict[str, Any], importance: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    rows = step["rows"]
    on_gpu = any(r["added_peak_bytes"] is not None for r in rows)
    lines = [INTRO.format(**step["machine"])]
    lines += [
        "| model, targets | r | batch | step ms | addition | ms | % of the step | kept |"
        + (" whole step | peak |" if on_gpu else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|---|" if on_gpu else ""),
    ]
    for r in rows:
        cells = [
            f"{r['shape']}, {r['targets']}", str(r["rank"]), f"{r['batch']} × {r['tokens']}",
            f"{r['step_ms']:.1f}", r["addition"], f"{r['added_ms']:.2f}",
            f"{r['added_percent']:.2f}", size(r["kept_bytes"]),
        ]  # fmt: skip
        if on_gpu:
            cells += [f"{r['whole_step_difference_ms']:+.2f} ms", size(r["added_peak_bytes"])]
        lines.append("| " + " | ".join(cells) + " |")
    first = importance["rows"][0]
    lines.append(IMPORTANCE.format(steps=f"Batch {first['batch']} × {first['tokens']} tokens"))
    lines += ["| model | importance | seconds | on disk | timed |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['shape']} | {r['method']} | {r['seconds']:,.1f} | {size(r['disk_bytes'])} | "
        f"{r['timed']} |"
        for r in importance["rows"]
    ]
    if not on_gpu:
        lines.append(
            LIMITS.format(
                limits="No GPU was there: peak memory, the Triton kernels' speed (their results "
                "are tested under Triton's interpreter) and the paper's model sizes. On a machine "
                "with one, `make bench` measures them and writes this page anew."
            )
        )
    return "\n".join(lines).rstrip() + "\n"


def plot(step: dict[str, Any], path: Path) -> None:
    """Time added against the elements of the target matrices."""
    from hlora.figures import STYLES, load_pyplot, save_figure

    figure, axes = load_pyplot().subplots(figsize=(5.6, 3.2), layout="constrained")
    first = step["rows"][0]
    rows = [r for r in step["rows"] if all(r[k] == first[k] for k in ("rank", "batch", "tokens"))]
    names = list(dict.fromkeys(r["addition"] for r in rows))
    recorded = (r for r in rows if r["addition"] == "record, dense")
    dense = {_key(r): r["kept_bytes"] / 4 for r in recorded}
    for i, name in enumerate(names):
        of = [r for r in rows if r["addition"] == name]
        points = sorted((dense[_key(r)], r["added_ms"]) for r in of)
        axes.loglog(
            [x for x, _ in points], [y for _, y in points], linestyle=STYLES[i % len(STYLES)],
            marker="osv^D*Px"[i % 8], markersize=4, label=name,
        )  # fmt: skip
    axes.set_xlabel("elements of the target matrices")
    axes.set_ylabel(f"added to a step (ms), r {first['rank']}")
    axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("shape", "targets", "rank", "batch", "tokens"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", default="results/cost-step.json")
    parser.add_argument("--importance", default="results/cost-importance.json")
    parser.add_argument("--output", default="docs/cost.md")
    given = parser.parse_args()
    step, importance = (
        json.loads(Path(f).read_text("utf-8")) for f in (given.step, given.importance)
    )
    plot(step, Path(given.output).with_suffix(".svg"))
    text = page(step, importance)
    text += "\n![Time added to a step against the size of the target matrices](cost.svg)\n"
    write_whole(Path(given.output), text)
    print(f"Written to {given.output}.")


if __name__ == "__main__":
    main()
