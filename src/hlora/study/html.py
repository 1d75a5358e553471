"""One self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2

from hlora.files import write_whole


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first column is text, the others are figures."""

    headings: list[str]
    rows: list[list[str]]
    strong: str = ""
    """The first cell of the row to point out."""
    prose: bool = False
    """The first column holds sentences."""

    def markdown(self) -> list[str]:
        """Its lines: figures to the right, and all to the left where there is prose."""
        align = ["---", *(["---" if self.prose else "---:"] * (len(self.headings) - 1))]
        rows = [self.headings, align, *self.rows]
        return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it, each part optional."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: list[tuple[str, str]] = field(default_factory=list)
    """(SVG, caption) pairs."""
    code: str = ""


def write_report(path: Path, title: str, lead: str, sections: list[Section]) -> None:
    """Write the page, whole or not at all."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("hlora").joinpath("report.html").read_text(encoding="utf-8")
    )
    write_whole(path, template.render(title=title, lead=lead, sections=sections))
