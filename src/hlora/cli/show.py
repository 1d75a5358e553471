"""Tables as the terminal shows them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.table import Table

from hlora.cli.screen import Screen


def show(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *,
    words: Collection[str] = (), strong: int | None = None, width: int = 0,
) -> None:  # fmt: skip
    """Print a table: words to the left, figures to the right; nothing where there are no rows.

    Args:
        words: headings of columns of words, besides the first.
        strong: the index of the row to point out.
        width: columns to use at least where the output is no terminal.
    """
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i and heading not in words else "left")
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if i == strong else "")
    console = Screen()
    if not console.is_terminal:
        console.width = max(console.width, width)
    if table.row_count:
        console.print(table)
