"""Figures, readable in black and white."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hlora.core.layers import layer_grid
from hlora.errors import InputError

STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


def load_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InputError("Figures need matplotlib: pip install 'hlora[report]'.") from None
    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none", "svg.hashsalt": "hlora", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False,
        }
    )  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def heatmap(norms: dict[str, float], title: str = "") -> Any:
    """‖Ω_l‖₂ by block and target on a log scale (Fig. 7)."""
    pyplot = load_pyplot()
    from matplotlib.colors import LogNorm

    targets, blocks, rows = layer_grid(norms)
    values = [[v if v else float("nan") for v in row] for row in rows]
    figure, axes = pyplot.subplots(
        figsize=(max(5.0, 0.24 * len(blocks) + 1.8), 0.34 * len(targets) + 1.1),
        layout="constrained",
    )
    shown = axes.imshow(values, norm=LogNorm(), cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(targets)), targets)
    ticks = range(0, len(blocks), max(1, len(blocks) // 10))
    axes.set_xticks(ticks, [str(blocks[i]) for i in ticks])
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(shown, ax=axes, label="‖Ω‖₂", pad=0.01)
    if title:
        axes.set_title(title, loc="left")
    return figure


def loss_curves(log: list[dict[str, float]], title: str = "") -> Any:
    """Task loss, penalty φR and their sum over the steps of phase μ (Fig. 4)."""
    pyplot = load_pyplot()
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(5.2, 3.6), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    steps = [e["step"] for e in log]
    above.plot(steps, [e["loss"] for e in log], STYLES[0], color="black", label="task")
    if all("total_loss" in e for e in log):
        total, penalty = [e["total_loss"] for e in log], [e["penalty"] for e in log]
        above.plot(steps, total, STYLES[1], color="#0072b2", label="total")
        below.plot(steps, penalty, STYLES[0], color="#d55e00")
    above.set_ylabel("loss (nats)")
    above.legend(frameon=False)
    below.set_ylabel("φR")
    below.set_xlabel("optimizer step")
    below.set_ylim(bottom=0)
    if title:
        above.set_title(title, loc="left")
    return figure


def several_losses(logs: dict[str, list[dict[str, float]]], title: str = "") -> Any:
    """The task loss of several runs over their steps."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(5.2, 3.0), layout="constrained")
    for (name, log), style in zip(logs.items(), STYLES, strict=False):
        axes.plot([e["step"] for e in log], [e["loss"] for e in log], linestyle=style, label=name)
    axes.set_ylabel("task loss (nats)")
    axes.set_xlabel("optimizer step")
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left")
    return figure


def forgetting_chart(
    changes: dict[str, dict[str, tuple[float, float]]], highlight: str = ""
) -> Any:
    """Forgetting by model, one panel for each kind of text.

    Args:
        changes: kind of text → model → (nats per token, standard error).
        highlight: the model whose bars are filled.
    """
    pyplot = load_pyplot()
    models = list(next(iter(changes.values())))
    figure, panels = pyplot.subplots(
        1, len(changes), figsize=(7.4, 0.36 * len(models) + 0.9), sharey=True, sharex=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, (kind, by_model) in zip(panels[0], changes.items(), strict=True):
        values = [by_model[m][0] for m in models]
        errors = [by_model[m][1] for m in models]
        colors = ["#0072b2" if m == highlight else "white" for m in models]
        axes.barh(
            models, values, xerr=errors, color=colors, edgecolor="black", height=0.6,
            error_kw={"elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(kind, loc="left")
        axes.tick_params(axis="y", length=0)
    panels[0][0].invert_yaxis()
    figure.supxlabel("forgetting (nats per token); left of zero is learned", fontsize="medium")
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
    """Write STEM.svg and STEM.png; returns the figure as an <svg> element.

    Raises:
        InputError: they cannot be written.
    """
    svg = stem.with_suffix(".svg")
    save_figure(figure, stem.with_suffix(".png"), svg)
    return _element(svg.read_text("utf-8"))


def as_svg(figure: Any) -> str:
    """The figure as an <svg> element, to be put into a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    load_pyplot().close(figure)
    return _element(text.getvalue())


def _element(svg: str) -> str:
    """Without the head of a file."""
    return svg[svg.index("<svg") :]
