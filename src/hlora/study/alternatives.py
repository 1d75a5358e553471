"""A figure in words, read from what is drawn in it: for those who cannot see it."""

from __future__ import annotations

import math
from typing import Any

MANY = 6
"""More points than these are told by their ends, the lowest and the highest."""


def in_words(figure: Any) -> str:
    """Panel by panel: every line with its points, every bar, and the extremes of a heatmap."""
    titles: dict[int, str] = {}
    heights: dict[int, tuple[str, list[str]]] = {}
    said = []
    for axes in figure.axes:
        if hasattr(axes, "_colorbar"):
            continue
        at = axes.get_subplotspec()
        row, column = at.rowspan.start, at.colspan.start
        # What a column or a row shares stands at its first panel alone.
        title = titles[column] = (
            axes.get_title("left") or axes.get_title() or titles.get(column, "")
        )
        up, names = heights.get(row, ("", []))
        names = [t.get_text() for t in axes.get_yticklabels()] or names
        up = axes.get_ylabel() or up
        heights[row] = up, names
        across = axes.get_xlabel()
        if axes.images:
            head = [axes.images[0].colorbar.ax.get_ylabel()]
        elif up and across:
            head = [title, f"{up} against {across}"]
        else:
            head = [" against ".join(filter(None, (title, across)))] if across else [title, up]
        told = [*_lines(axes), *_bars(axes, names), *_cells(axes, names)] or _points(axes)
        said.append(f"{', '.join(filter(None, head))}: {'; '.join(told) or 'nothing'}.")
    return " ".join(said).replace(r"\$", "$")


def _lines(axes: Any) -> list[str]:
    """What has a label: `y at x` for each point."""
    found = []
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        if hasattr(line, "get_xydata"):
            found.append(f"{label} {_course(line.get_xydata().tolist())}")
    return found


def _course(points: list[list[float]]) -> str:
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not known:
        return "without points"
    if [x for x, _ in known] == [0, 1] and known[0][1] == known[1][1]:
        return f"level at {known[0][1]:.3g}"  # a line across the panel
    if len(known) <= MANY:
        return ", ".join(f"{y:.3g} at {x:.4g}" for x, y in known)
    (x0, y0), (x1, y1) = known[0], known[-1]
    low, high = (pick(known, key=lambda p: p[1]) for pick in (min, max))
    return (
        f"from {y0:.3g} at {x0:.4g} to {y1:.3g} at {x1:.4g}, lowest {low[1]:.3g} at {low[0]:.4g}, "
        f"highest {high[1]:.3g} at {high[0]:.4g}"
    )


def _points(axes: Any) -> list[str]:
    """Runs above a name, where no line has a label: each stands on one tick."""
    labels = [t.get_text() for t in axes.get_xticklabels()]  # less where none are shown
    names = dict(zip(axes.get_xticks(), labels, strict=False))
    found = []
    for line in axes.lines:
        across = set(line.get_xdata())
        name = names.get(next(iter(across))) if len(across) == 1 else None
        if line.get_label().startswith("_") and name:
            found.append(f"{name} {', '.join(f'{y:.4g}' for y in line.get_ydata())}")
    return found


def _bars(axes: Any, names: list[str]) -> list[str]:
    return [
        f"{name} {w:,.0f}" if abs(w := bar.get_width()) >= 1000 else f"{name} {w:.3g}"
        for bars in axes.containers if hasattr(bars, "patches")
        for name, bar in zip(names, bars.patches, strict=False)
    ]  # fmt: skip


def _cells(axes: Any, names: list[str]) -> list[str]:
    found = []
    for image in axes.images:
        cells = [
            (value, f"{name} {axes.xaxis.get_major_formatter()(block)}")
            for name, values in zip(names, image.get_array().filled(math.nan).tolist(), strict=True)
            for block, value in enumerate(values)
            if math.isfinite(value)
        ]
        ordered = [f"{name} {value:.3g}" for value, name in sorted(cells, reverse=True)]
        found.append(f"largest {', '.join(ordered[:3])}; smallest {', '.join(ordered[-3:])}")
    return found
