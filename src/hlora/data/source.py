"""General text: files, folders and hub data sets as documents, read as they are asked for."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlora.data import pythontext
from hlora.data.encode import as_messages, is_chat
from hlora.data.read import (
    ROWS,
    SUFFIXES,
    data_files,
    is_saved,
    load_hub,
    load_saved,
    missing,
    read_rows,
    read_text,
    suffix_of,
)
from hlora.errors import InputError

PIECE = 1 << 16
"""Characters that are tokenized at once: a .txt file may be larger than the memory."""

LOOK = 100
"""Rows that are looked at to find the column with the text."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.\[\]:%-]+)?(\^[\w./-]+)?$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        where: its file and row.
        text: in pieces, or a list of chat messages.
    """

    where: str
    text: Iterator[str] | list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One kind of text.

    Attributes:
        name: what tables call it.
        where: a file, a folder, `python-docs`, `python-docstrings` or `python-code` with
            `@train` or `@test` (`hlora.data.pythontext`), or `owner/name[:config][@split]` on the
            hub.
        column: the column with the text, or several as `a+b`; None finds it.
        hub: load with `datasets.load_dataset`.
    """

    name: str
    where: str
    column: str | None = None
    hub: bool = False

    @classmethod
    def parse(cls, spec: str, column: str | None = None) -> Source:
        """From `[NAME=]WHERE[#COLUMN]`; `hub:` before WHERE forces the hub's loader.

        Raises:
            InputError: neither a path nor a possible hub name.
        """
        name, sep, where = spec.partition("=")
        if not sep or "/" in name:
            name, where = "", spec
        forced = where.startswith("hub:")
        where = where.removeprefix("hub:")
        if "#" in where and not Path(where).exists():
            where, _, column = where.rpartition("#")
        path = Path(where)
        if not forced and not path.exists() and pythontext.is_name(where):
            _built_in(where)
            return cls(name or where.partition("@")[0], where, column)
        folder = Path(where.partition("@")[0])
        local = path.exists() or is_saved(folder)
        hub = forced or not local
        if hub and not forced and (suffix_of(path) in SUFFIXES or not _HUB_NAME.match(where)):
            raise InputError(f"There is no text at {where}.")
        return cls(name or _stem(path) or where, where, column, hub)

    def documents(self) -> Iterator[Document]:
        """The texts, one at a time, read as they are asked for.

        Raises:
            InputError: nothing there can be read as text.
        """
        if self.hub:
            return _column(load_hub(self.where), self.column, self.where)
        path = Path(self.where)
        if not path.exists() and pythontext.is_name(self.where):
            text = pythontext.python_text(*_built_in(self.where))
            return iter([Document(self.where, _pieces(text))])
        folder, _, split = self.where.partition("@")
        saved = path if is_saved(path) else Path(folder)
        if is_saved(saved):
            rows = load_saved(saved, "" if saved == path else split)
            return _column(rows, self.column, self.where)
        files = data_files(path) if path.is_dir() else [path]
        return (document for file in files for document in _from_file(file, self.column))


def sources(specs: Sequence[str], column: str | None) -> list[Source]:
    """Several kinds of text, each with a name of its own.

    Raises:
        InputError: two have one name, or one is no text.
    """
    found = [Source.parse(spec, column) for spec in specs]
    for a, b in itertools.combinations(found, 2):
        if a.name == b.name:
            raise InputError(
                f"Two kinds of text have the same name, {a.name} ({a.where} and {b.where}): name "
                "them with --text NAME=WHERE ..."
            )
    return found


def _built_in(where: str) -> tuple[str, str]:
    """Kind and split of `python-KIND[@SPLIT]`."""
    name, _, split = where.partition("@")
    kind, split = name.removeprefix(pythontext.PREFIX), split or "train"
    if kind not in pythontext.KINDS or split not in pythontext.SPLITS:
        known = ", ".join(pythontext.PREFIX + k for k in pythontext.KINDS)
        raise InputError(f"There is no text at {where}; built in are {known}, @train or @test.")
    return kind, split


def _pieces(document: str) -> Iterator[str]:
    """Cut at a line break near each PIECE characters."""
    start = 0
    while len(document) - start > 2 * PIECE:
        cut = document.find("\n", start + PIECE, start + 2 * PIECE)
        cut = start + PIECE if cut < 0 else cut + 1
        yield document[start:cut]
        start = cut
    yield document[start:]


def _stem(path: Path) -> str:
    """A file's name without what says how it is stored, and of which split it is."""
    name = path.name
    while Path(name).suffix.lower() in (*SUFFIXES, ".gz", ".bz2", ".xz"):
        name = Path(name).stem
    return re.sub(r"\.(train|test)$", "", name)


def _from_file(path: Path, column: str | None) -> Iterator[Document]:
    if suffix_of(path) in ROWS:
        return _column(read_rows(path), column, str(path))
    return iter([Document(str(path), read_text(path, PIECE))])


def _column(rows: Iterator[dict[str, Any]], column: str | None, where: str) -> Iterator[Document]:
    """The text in each row. Rows that have none are passed over, and counted."""
    first = list(itertools.islice(rows, LOOK))
    columns = (column or _find_column(first, where)).split("+")
    skipped: list[int] = []
    number = 0
    for number, row in enumerate(itertools.chain(first, rows), 1):
        here = f"{where}, row {number}"
        parts: list[Any] = [row.get(c) for c in columns]
        if not all(any(c in r for r in first) for c in columns):
            raise InputError(
                f"{where} has no text column {'+'.join(columns)!r}; its columns are "
                f"{', '.join(row)}."
            )
        if any(missing(p) or p in ("", []) for p in parts):
            skipped.append(number)
        elif len(parts) == 1 and is_chat(parts[0]):
            yield Document(here, as_messages(parts[0], here))
        elif wrong := [c for c, p in zip(columns, parts, strict=True) if not isinstance(p, str)]:
            raise InputError(f"{here}: {wrong[0]!r} is not text: {str(row[wrong[0]])[:40]!r}.")
        else:
            yield Document(here, _pieces("\n".join(parts)))
    if skipped:
        logger.warning(
            "%s: %d of %d rows have no text and were skipped; the first is row %d.",
            where, len(skipped), number, skipped[0],
        )  # fmt: skip


def _find_column(rows: list[dict[str, Any]], where: str) -> str:
    """`text`, or the one column that holds text or chats, or may do where all cells are empty."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    if "text" in names or not rows:
        return "text"
    held = {k: [v for row in rows if not missing(v := row.get(k))] for k in names}
    text = [k for k, v in held.items() if all(isinstance(x, str) or is_chat(x) for x in v)]
    if len(text) != 1:
        raise InputError(
            f"{where} has the columns {', '.join(map(str, names))}: name the one with the text "
            "with --text-column."
        )
    return text[0]
