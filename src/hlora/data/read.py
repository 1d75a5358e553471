"""The one reader of files and hub data sets: rows of named values, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hlora.errors import InputError

TEXT = (".txt", ".md")
ROWS = (".jsonl", ".json", ".parquet")
SUFFIXES = (*TEXT, *ROWS)
"""What is read; in a folder, everything else is passed over."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one of the suffixes ROWS.

    Raises:
        InputError: it cannot be read; a line that is no JSON object is named.
    """
    return _parquet(path) if path.suffix == ".parquet" else _json_lines(path)


def read_text(path: Path) -> str:
    """A file as UTF-8 text.

    Raises:
        InputError: it is none.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON ({error}).") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not a JSON object.")
                yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("Reading .parquet needs pyarrow: pip install 'hlora[data]'.") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}).") from None


def load_hub(where: str, default_split: str = "train") -> Iterator[dict[str, Any]]:
    """Rows of `owner/name[:config][@split]`, streamed.

    Raises:
        InputError: the data set cannot be reached or has no such split or config.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"There is no file {where}; hub data sets need: pip install 'hlora[data]'."
        ) from None
    where, _, split = where.partition("@")
    name, _, config = where.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or default_split, streaming=True)
        yield from rows
    except Exception as error:  # any loader may raise anything
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name} is no file here and cannot be loaded as a hub data set: {text}"
        ) from None
