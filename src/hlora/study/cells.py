"""A table of a report: cells as they are shown, what they say as figures, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from hlora.errors import visible

Best = Callable[[Iterable[float]], float]
"""`min` or `max`."""


class Figure(NamedTuple):
    """What a cell says, digit by digit: `value ± error`, or `value [low, high]`; of a bound too."""

    value: str
    error: str | None
    low: str | None
    high: str | None


_NUMBER = r"([+-]?\d[\d,]*(?:\.\d+)?)"
_OF_SOME = r" \(\d+ of \d+\)"
"""A mean over some of the row's seeds: no rival of the others."""
_CELL = re.compile(
    rf"(?:[<≤] )?{_NUMBER}(?: ± {_NUMBER}| \[{_NUMBER}, {_NUMBER}\]| \(n = 1\))?(?:{_OF_SOME})?"
)
_PARTS = ("", ", one standard error", ", low", ", high")


def figure_of(cell: str) -> Figure | None:
    """None where the cell is words, or `–`."""
    found = _CELL.fullmatch(cell)
    return Figure(*(n and n.replace(",", "") for n in found.groups())) if found else None


def as_markdown(text: str) -> str:
    """Text in one line that Markdown shows as it is: no HTML, no links, no cells."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", visible(text))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"([\\`\[\]|$])", r"\\\1", text)
    text = text.replace("\n", " ").replace("://", r":\//")
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text)


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, one measure each. The first column names the row."""

    headings: list[str]
    rows: list[list[str]]
    strong: str = ""
    """The first cell of the row to point out."""
    best: Mapping[int, Best] = field(default_factory=dict)
    """Columns whose best figure is marked."""
    apart: frozenset[str] = frozenset()
    """First cells of rows that are no rivals: the base model."""

    @cached_property
    def figures(self) -> list[list[Figure | None]]:
        """Of every cell but the first of a row, which is a name."""
        return [[None, *map(figure_of, row[1:])] for row in self.rows]

    @cached_property
    def numeric(self) -> list[bool]:
        """The columns that hold more figures than words."""
        return [
            sum(1 if of[j] else -1 for of, row in zip(self.figures, self.rows, strict=True)
                if row[j] != "–") > 0
            for j in range(len(self.headings))
        ]  # fmt: skip

    @cached_property
    def marked(self) -> set[tuple[int, int]]:
        """Row and column of each best figure, as far as its digits show; none without a rival."""
        found = set()
        for column, best in self.best.items():
            values = {
                i: float(figure.value) for i, of in enumerate(self.figures)
                if (figure := of[column]) and self.rows[i][0] not in self.apart
                and not re.search(_OF_SOME, self.rows[i][column])
            }  # fmt: skip
            if len(values) > 1:
                top = best(values.values())
                found |= {(i, column) for i, v in values.items() if v == top}
        return found

    def markdown(self) -> list[str]:
        """Its lines: figures to the right, the best of a column bold."""
        align = ["---:" if right else "---" for right in self.numeric]
        cells = [
            [
                f"**{as_markdown(c)}**" if (i, j) in self.marked else as_markdown(c)
                for j, c in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]
        headings = [as_markdown(h) for h in self.headings]
        return ["| " + " | ".join(row) + " |" for row in (headings, align, *cells)]

    def csv(self) -> str:
        """Its figures: an error and the ends of an interval are columns of their own."""
        columns = []
        for j, heading in enumerate(self.headings):
            if self.headings.count(heading) > 1:  # p, after each measure
                heading = f"{self.headings[j - 1]}, {heading}"
            cells = [(row[j], of[j]) for row, of in zip(self.rows, self.figures, strict=True)]
            for k, part in enumerate(_PARTS):
                if k == 0 or any(figure and figure[k] for _, figure in cells):
                    columns.append([heading + part, *(_part(c, figure, k) for c, figure in cells)])
        text = io.StringIO()
        rows = zip(*columns, strict=True)
        csv.writer(text, lineterminator="\n").writerows([_plain(c) for c in row] for row in rows)
        return text.getvalue()


def _part(cell: str, figure: Figure | None, part: int) -> str:
    if figure and not cell.startswith("<"):  # "< 0.001" is no value
        bound = "≤ " if cell.startswith("≤") and not part else ""
        return bound + (figure[part] or "")
    return "" if part or cell == "–" else cell


def _plain(cell: str) -> str:
    """A spreadsheet would take what begins like a formula for one; figures are none."""
    return ("'" if re.match("[=+@-]", cell) and not figure_of(cell) else "") + visible(cell)
