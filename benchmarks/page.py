"""docs/cost.md and its plot, from results/cost.json.

python -m benchmarks.page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import cost, kernels, targets
from hlora.files import size, write_whole
from hlora.study.cells import Table

INTRO = """# What it costs

Made by `make bench` on {device} (torch {torch}, Python {python}, hlora {hlora}).

## Added to a LoRA step

Milliseconds are medians. A row's peers are the plain LoRA step, and the same addition in plain
torch, of the same run. "Floor" is the time to read the importance once (and to write it, in
recording) at the speed of a copy in the same run. "Kept" is what stays in memory; the penalty in
plain torch keeps θ^ν as a dense matrix beside Ω, ours keeps its thin factors. In the row with looks
all steps from one look to the next are timed together, and one of them is given.
"""

BOUNDS = """
"At work" is the time that the GPU's kernels take. Where it is near the floor, memory bounds the
addition; where it is near the whole, arithmetic does; what is left above it is launches.
"""

HOST = """
## What the host has to queue

Operations of torch in a step (views apart), in a model with the depth of Llama-3.2-3B and next to
nothing in its matrices: the same on every machine. On a GPU each is about a launch. Ours leave out
the work of `core.ops` itself: for each group of matrices of one shape, one kernel in recording,
one kernel and three sums in the penalty. "Waits" are values that the host reads, and so waits for.
"""

KERNELS = """
## The kernels

Compiled for compute capability {capability} by Triton {triton} (`python -m benchmarks.kernels`;
no GPU is needed). A kernel with a stack of more than some bytes spills registers. The last columns
are a thread's instructions for each element of Ω, a product's chunk of 16 columns counted once:
all, multiply-adds, and 4-byte words through shared memory.
"""

STORAGE = """
## What an importance takes

On disk, and in memory in phase μ. Percent are of EWC-LoRA's: one float32 for each parameter of the
base model.
"""

IMPORTANCE = """
## To get an importance

Batch {batch} × {tokens} tokens. A few steps and sequences were timed and scaled. "EWC-LoRA, as
published" takes all parameters, one sequence at a time, and copies each gradient to the CPU; "lean"
is ours (`--kind fisher`): target matrices only, whole batches, labels sampled from the model. Peak
memory is the GPU's, or the process's where there is none, with the model and all else.
"""

GOALS = """
## What was to be reached

LoRA of r 8 on q and v. On an H100, at the shapes of Llama-3.2-3B with 20 × 128 tokens; in the rows
of smollm2 on the processor above, with 8 × 128 tokens.
"""

LIMITS = """
## What is not measured here

No GPU was there: what is added to the peak memory of a step, the Triton kernels' speed (their
results are tested under Triton's interpreter) and the times of the paper's models. On a machine
with one, `make bench` measures them and writes this page anew.
"""


def table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(Table(headings, rows).markdown())


def page(found: dict[str, dict[str, Any]]) -> str:
    """The whole page as Markdown, from what each benchmark wrote."""
    step, importance = found["step"], found["importance"]
    on_gpu = any(r["added_peak_bytes"] is not None for r in step["rows"])
    parts = [INTRO.format(**step["machine"]), _steps(step["rows"], on_gpu)]
    parts += [BOUNDS] if on_gpu else []
    parts += [HOST, _host(found["host"]["rows"])]
    if "kernels" in found:  # Triton is for Linux
        parts += [KERNELS.format(**found["kernels"]), _kernels(found["kernels"]["rows"])]
    parts += [STORAGE, _storage(found["storage"]["rows"])]
    parts += [IMPORTANCE.format(**importance["rows"][0]), _importance(importance["rows"])]
    goals = targets.verdicts(step["rows"], importance["rows"], found["storage"]["rows"])
    header = ["", "to reach", "measured", ""]
    parts += [GOALS, table(header, [list(g) for g in goals])]
    parts += [] if on_gpu else [LIMITS]
    return "\n".join(parts).rstrip() + "\n"


def _steps(rows: list[dict[str, Any]], on_gpu: bool) -> str:
    header = ["model, targets", "r", "batch", "step ms", "addition", "ms", "% of the step"]
    header += ["floor ms", "kept", *(["at work ms", "whole step ms", "peak"] if on_gpu else [])]
    lines = []
    for r in rows:
        cells = [
            f"{r['shape']}, {r['targets']}", str(r["rank"]), f"{r['batch']} × {r['tokens']}",
            f"{r['step_ms']:.1f}", r["addition"], f"{r['added_ms']:.2f}",
            f"{r['added_percent']:.2f}", f"{r['floor_ms']:.2f}", size(r["kept_bytes"]),
        ]  # fmt: skip
        if on_gpu:
            cells += [f"{r['busy_ms']:.2f}", f"{r['whole_step_difference_ms']:+.2f}"]
            cells += [size(r["added_peak_bytes"])]
        lines.append(cells)
    return table(header, lines)


def _host(rows: list[dict[str, Any]]) -> str:
    cells = [
        [r["addition"], str(r["operations"]), f"{r['percent']:.2f}", str(r["waits"])] for r in rows
    ]
    return table(["", "operations", "% of the step", "waits"], cells)


def _kernels(rows: list[dict[str, Any]]) -> str:
    header = ["kernel", "Ω", "r", "tile", "warps", "registers", "stack", "shared"]
    header += ["instructions", "multiply-adds", "shared words"]
    cells = [
        [
            r["kernel"], r["omega"], r["rank"], " × ".join(map(str, r["tile"])),
            str(r["warps"]), str(r["registers"]), size(r["stack_bytes"]), size(r["shared_bytes"]),
            *(
                f"{r[k + '_per_element']:.2f}"
                for k in kernels.COUNTED
            ),
        ]
        for r in rows
    ]  # fmt: skip
    return table(header, cells)


def _storage(rows: list[dict[str, Any]]) -> str:
    forms = list(rows[0]["bytes"])
    cells = [
        [
            f"{r['shape']}, {r['targets']}",
            *(f"{size(n)} ({100 * n / r['ewc_bytes']:.2g} %)" for n in r["bytes"].values()),
            size(r["ewc_bytes"]),
        ]
        for r in rows
    ]
    return table(["model, targets", *forms, "EWC-LoRA"], cells)


def _importance(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            r["shape"], r["method"], f"{r['seconds']:,.1f}",
            "" if r["peak_bytes"] is None else size(r["peak_bytes"]),
            size(r["disk_bytes"]), r["timed"],
        ]
        for r in rows
    ]  # fmt: skip
    return table(["model", "importance", "seconds", "peak memory", "on disk", "timed"], cells)


def plot(step: dict[str, Any], path: Path) -> None:
    """Time added against the elements of the target matrices."""
    from hlora.study.figures import STYLES, load_pyplot, save_figure

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
    parser = cost.parser(__doc__)
    parser.add_argument("--output", default="docs/cost.md")
    given = parser.parse_args()
    found = cost.read(given.json)
    missing = [part for part in ("step", "importance", "storage", "host") if part not in found]
    if missing:
        parser.error(f"{given.json} lacks {', '.join(missing)}: run `make bench`, which does all.")
    plot(found["step"], Path(given.output).with_suffix(".svg"))
    text = page(found)
    text += "\n![Time added to a step against the size of the target matrices](cost.svg)\n"
    write_whole(Path(given.output), text)
    print(f"Written to {given.output}.")


if __name__ == "__main__":
    main()
