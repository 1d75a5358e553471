"""The paper's figures and ours, readable in black and white."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hlora.core.layers import layer_grid
from hlora.errors import InputError, optional, visible
from hlora.run.means import mean_se
from hlora.study.cost import Cost
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS
from hlora.study.rows import Results, Row
from hlora.study.stats import independent, p_equals

STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p", "d", "8")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
"""Okabe and Ito's, told apart by the color-blind; markers and lines tell methods apart in print."""
OURS, RIVAL = COLORS[0], COLORS[4]
OURS_AT_BASE = ("kronecker", "sketch", "blend")


def violins(results: Results, ours: Row, rival: Row) -> Any:
    """Fig. 3: two rows over their seeds, with Welch's t-test. Every run is a point."""
    metrics = ("ppl_seen", "ppl_unseen", "acc")
    tasks = results.tasks
    size = (2.4 * len(tasks) + 0.6, 1.9 * len(metrics))
    figure, axes = _panels(len(metrics), len(tasks), size)
    for metric, row in zip(metrics, axes, strict=True):
        for task, at in zip(tasks, row, strict=True):
            samples = [list(results.values(metric, r, task).values()) for r in (ours, rival)]
            for x, (values, color) in enumerate(zip(samples, (OURS, RIVAL), strict=True)):
                if len(values) > 1 and len(set(values)) > 1:
                    body = at.violinplot([values], positions=[x], showextrema=False)["bodies"][0]
                    body.set(facecolor=color, edgecolor="black", alpha=0.35)
                at.plot([x] * len(values), values, MARKERS[x], color="black", markersize=3)
            p = independent(*samples)
            at.set_title(f"{_name(task)}: p {p_equals(p.welch)}", fontsize="medium")
            at.set_xticks([0, 1], [_name(Row(r.method, None).label) for r in (ours, rival)])
            at.set_xlim(-0.6, 1.6)
        row[0].set_ylabel(METRICS[metric].label)
    return figure


def losses(results: Results, row: Row) -> Any:
    """Fig. 4: task loss, φR and their sum over the steps of μ, the mean over seeds."""
    columns = len(results.tasks)
    size = (2.4 * columns + 0.8, 3.4)
    figure, axes = _panels(2, columns, size, sharex=True, height_ratios=(2, 1))
    for task, (above, below) in zip(results.tasks, axes.T, strict=True):
        logs = [r["log"] for r in results.of(row, task)]
        curves = [("loss", "task", above), ("total_loss", "total", above), ("penalty", "φR", below)]
        for style, (key, label, at) in zip(STYLES, curves, strict=False):
            at.plot(*_mean_curve(logs, key), linestyle=style, color="black", label=label)
        above.set_title(_name(task), loc="left")
        below.set(ylim=(0, None), xlabel="optimizer step")
    axes[0][0].set_ylabel("loss (nats)")
    axes[1][0].set_ylabel("φR")
    axes[0][-1].legend(frameon=False)
    return figure


def _mean_curve(logs: list[list[dict[str, float]]], key: str) -> tuple[list[float], list[float]]:
    """The mean over runs at each step that all of them logged."""
    curves = [{e["step"]: e[key] for e in log if key in e} for log in logs]
    steps = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    return steps, [statistics.fmean(c[s] for c in curves) for s in steps]


def cost_bars(found: dict[str, Cost]) -> Any:
    """Fig. 5: seconds and bytes of each method's importance, on log scales."""
    figure, [panels] = _panels(1, 2, (7.4, 0.4 * len(found) + 0.9), sharey=True)
    units = {
        "seconds": [c.seconds for c in found.values()],
        "MiB on disk": [c.bytes / 2**20 for c in found.values()],
    }
    for at, (unit, values) in zip(panels, units.items(), strict=True):
        bars = at.barh(list(found), values, color="white", edgecolor="black", height=0.6)
        shown = [f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in values]
        at.bar_label(bars, shown, padding=3, fontsize="small")
        at.set(xscale="log", xlabel=unit)
        at.set_xlim(right=at.get_xlim()[1] * 4)
        at.tick_params(axis="y", length=0)
    for drawn, cost in zip(panels[0].patches, found.values(), strict=True):
        if cost.extrapolated:
            drawn.set_hatch("///")
    panels[0].invert_yaxis()
    return figure


def phi_curves(results: Results) -> Any | None:
    """Fig. 6: each measure against φ, a row of panels a task, ± one standard error over seeds.

    Of the methods that a task has with several strengths; None without any.
    """
    metrics = ("forgetting_seen", "forgetting_unseen", "nll", "acc")
    rows = [r for r in results.rows if r.phi]
    by_task = {
        task: {
            method: of
            for method, found in groupby(rows, key=lambda r: r.method)
            if len(of := [r for r in found if results.of(r, task)]) > 1
        }
        for task in results.tasks
    }
    by_task = {task: sweeps for task, sweeps in by_task.items() if sweeps}
    if not by_task:
        return None
    methods = list(dict.fromkeys(m for sweeps in by_task.values() for m in sweeps))
    drawn = {
        method: {
            **_style(method, methods), "linestyle": STYLES[i % len(STYLES)],
            "label": _label(results, [r for r in rows if r.method == method], list(by_task)),
        }
        for i, method in enumerate(methods)
    }  # fmt: skip
    size = (2.3 * len(metrics) + 0.6, 2.2 * len(by_task))
    figure, panels = _panels(len(by_task), len(metrics), size)
    for (task, sweeps), across in zip(by_task.items(), panels, strict=True):
        for metric, at in zip(metrics, across, strict=True):
            _phi_curve(results, metric, task, sweeps, drawn, at)
            title = f"{_name(task)}: {METRICS[metric].label}"
            at.set_title(title, loc="left", fontsize="medium")
            at.set_xlabel("φ")
    return _with_legend(figure, panels.flat)


def _phi_curve(
    results: Results, metric: str, task: str, sweeps: dict[str, list[Row]],
    drawn: dict[str, dict[str, Any]], at: Any,
) -> None:  # fmt: skip
    for method, rows in sweeps.items():
        points = [mean_se(values.values()) for values in results.alike(metric, rows, task)]
        at.errorbar(
            [r.phi for r in rows], [m for m, _ in points],
            yerr=[0 if math.isnan(e) else e for _, e in points], capsize=2, linewidth=1.2,
            markersize=5, **drawn[method],
        )  # fmt: skip
    plain = Row("lora-nu-mu", None)
    if results.of(plain, task):
        level = results.mean(metric, plain, task)
        at.axhline(level, color="black", linewidth=0.8, linestyle=":", label="no penalty (ν+μ)")
    at.set_xscale("log")
    at.xaxis.set_major_formatter("{x:g}")
    at.xaxis.set_minor_formatter("")


def frontier(results: Results) -> Any:
    """What the domain costs the rest: lower left is better. One panel a task, the mean over the
    seeds that all runs of a method on the task share.

    The cost is the KL from the base on a log scale, or the rise of the loss where not every run
    measured the KL. The legend says of how many seeds, where a method was not run with all.
    """
    across = "nll"
    rows = [r for r in results.rows if r.method not in METHODS or METHODS[r.method].trains]
    measured = {
        metric: sum(len(results.values(metric, r, t)) for r in rows for t in results.tasks)
        for metric in ("kl_unseen", "forgetting_unseen")
    }
    up = max(measured, key=lambda metric: measured[metric])  # the KL where both are as many
    tasks = [t for t in results.tasks if any(results.values(up, r, t) for r in rows)]
    tasks = tasks or results.tasks[:1]
    figure, [panels] = _panels(1, len(tasks), (max(7.4, 2.9 * len(tasks) + 0.5), 3.2))
    methods = {r.method: [of for of in rows if of.method == r.method] for r in rows}
    for task, at in zip(tasks, panels, strict=True):
        for method, rows_of in methods.items():
            of = [r for r in rows_of if results.values(up, r, task)]
            points = [
                [mean_se(values.values())[0] for values in results.alike(m, of, task)]
                for m in (across, up)
            ]
            if not of:
                continue
            at.plot(
                *points, linewidth=0.8, markersize=6,
                label=_label(results, rows_of, tasks), **_style(method, list(methods)),
            )  # fmt: skip
        if up == "kl_unseen":
            at.set_yscale("log", subs=(2, 5))  # which are the ticks between the powers of ten
            for ticks in ("major", "minor"):
                getattr(at.yaxis, f"set_{ticks}_formatter")("{x:g}")
        else:
            at.axhline(0, color="black", linewidth=0.6, linestyle=":")
        at.set_title(_name(task), loc="left")
        at.set_xlabel(METRICS[across].label)
    panels[0].set_ylabel(METRICS[up].label + " (nats per token)")
    return _with_legend(figure, panels)


def _label(results: Results, rows: list[Row], tasks: list[str]) -> str:
    """The name of a method, and ` (1 of 2 seeds)` where a row of it has not all of its task's."""
    found = [
        (n, len(results.seeds_of(t))) for r in rows for t in tasks if (n := len(results.of(r, t)))
    ]
    least, of = min((both for both in found if both[0] < both[1]), default=(0, 0))
    return _name(Row(rows[0].method, None).label) + (f" ({least} of {of} seeds)" * (least < of))


def task_losses(results: Results) -> Any:
    """The task's loss over the steps of one seed's runs."""
    figure, [[axes]] = _panels(1, 1, (5.2, 3.0))
    logs = {_name(r["label"]): r["log"] for r in results.lines if r.get("log")}
    for (label, log), style in zip(logs.items(), STYLES, strict=False):
        axes.plot([e["step"] for e in log], [e["loss"] for e in log], linestyle=style, label=label)
    axes.set(xlabel="optimizer step", ylabel="task loss (nats)")
    axes.legend(frameon=False)
    return figure


def forgetting_bars(results: Results, ours: Row | None) -> Any:
    """One seed's forgetting by kind of text, ± the error over its blocks; our bars are filled."""
    lines = [r for r in results.lines if r["run"]["method"] != "base"]
    models = [_name(r["label"]) for r in lines]
    colors = [OURS if ours and r["run"]["method"] == ours.method else "white" for r in lines]
    kinds = list(lines[0]["text"])
    size = (7.4, 0.36 * len(models) + 0.9)
    figure, [panels] = _panels(1, len(kinds), size, sharey=True, sharex=True)
    for axes, kind in zip(panels, kinds, strict=True):
        values = [r["forgetting"][kind]["nats"] for r in lines]
        errors = [r["forgetting"][kind]["se"] for r in lines]
        axes.barh(
            models, values, xerr=errors, color=colors, edgecolor="black", height=0.6,
            error_kw={"elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        unseen = " (unseen)" if kind in lines[0]["unseen"] else ""
        axes.set_title(_name(kind) + unseen, loc="left")
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    figure.supxlabel("forgetting (nats per token); left of zero is learned", fontsize="medium")
    return figure


def load_pyplot() -> Any:
    matplotlib = optional("matplotlib", "Figures need", "report")
    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none", "svg.hashsalt": "hlora", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False,
        }
    )  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def _style(method: str, methods: list[str]) -> dict[str, Any]:
    """What this library holds is filled and in one color; every method has its own shape."""
    index, ours = methods.index(method), _is_ours(method)
    others = [m for m in methods if not _is_ours(m)]
    color = OURS if ours else COLORS[1:][others.index(method) % len(COLORS[1:])]
    return {
        "color": color, "marker": MARKERS[index % len(MARKERS)], "linestyle": "-",
        "markerfacecolor": color if ours else "white",
    }  # fmt: skip


def _is_ours(method: str) -> bool:
    """HLoRA as in the paper, or held by importance gathered at the base; not what is rewound."""
    of = METHODS.get(method)
    at_base = of and not of.rewinds and (of.record or {}).get("kind") in OURS_AT_BASE
    return method.startswith("hlora") or bool(at_base)


def _name(text: str) -> str:
    """A name as it is: matplotlib takes what stands between two $ for a formula."""
    return visible(text).replace("$", r"\$")


def _panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> Any:
    """A figure of this size in inches, and its axes by row and column."""
    return load_pyplot().subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **shared
    )


def _with_legend(figure: Any, panels: Sequence[Any]) -> Any:
    """One legend below all panels, of what any of them shows: it takes no name's end, no panel's
    height."""
    both = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels)
    named = {label: handle for of in both for handle, label in of}
    for columns in range(max(1, int(figure.get_figwidth() // 3)), 0, -1):
        legend = figure.legend(
            named.values(), named, loc="outside lower center", ncols=columns, frameon=False
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)
    return figure


def heatmap(norms: dict[str, float]) -> Any:
    """‖Ω_l‖₂ by block and target on a log scale (Fig. 7)."""
    targets, blocks, rows = layer_grid(norms)
    values = [[v if v else float("nan") for v in row] for row in rows]
    size = (max(5.0, 0.24 * len(blocks) + 1.8), 0.34 * len(targets) + 1.1)
    figure, [[axes]] = _panels(1, 1, size)
    shown = axes.imshow(values, norm="log", cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(targets)), [_name(t) for t in targets])
    ticks = range(0, len(blocks), max(1, len(blocks) // 10))
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(lambda i, _: str(blocks[round(i)]))
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, label="‖Ω‖₂", pad=0.01)
    return figure


def save_figure(figure: Any, *paths: Path) -> None:
    """Write to .png, .svg or .pdf files.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            dated = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=150, **dated)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from None
    finally:
        load_pyplot().close(figure)


def save_both(figure: Any, stem: Path) -> str:
    """Write STEM.svg and STEM.png; returns the figure as an <svg> element."""
    svg = stem.with_suffix(".svg")
    save_figure(figure, stem.with_suffix(".png"), svg)
    text = svg.read_text("utf-8")
    return text[text.index("<svg") :]
