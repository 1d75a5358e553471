"""The one reader of files and data sets: rows of named values, or plain text."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hlora.data.parse import parse_json
from hlora.errors import InputError, one_line, optional

TEXT = (".txt", ".md", ".text", ".rst", ".tex", ".log", ".py")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (*TEXT, *ROWS)
"""What is read, in any case and also compressed; in a folder, everything else is passed over."""

_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = re.compile(
    r"(readme|license|licence|notice|changelog|citation|contributing|authors)$"
    r"|(dataset_infos?|dataset_dict|state|metadata|croissant)$",
    re.IGNORECASE,
)  # fmt: skip
"""Files about the files of a folder, and the notes that data sets keep of themselves."""


def suffix_of(path: Path) -> str:
    """What a file is by its name: the suffix, lower case, without that of a compression."""
    if path.suffix.lower() in _PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that hold text or rows, at any depth, in order.

    Raises:
        InputError: there are none.
    """
    files = [
        p
        for p in sorted(folder.rglob("*"))
        if suffix_of(p) in SUFFIXES
        and not any(part.startswith((".", "__")) for part in p.relative_to(folder).parts)
        and not _NO_TEXT.match(p.name.split(".")[0])
        and p.is_file()
    ]
    if not files:
        raise InputError(f"The folder {folder} holds no text ({', '.join(SUFFIXES)}).")
    return files


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one of the suffixes ROWS.

    Raises:
        InputError: it cannot be read; a line that is no JSON object is named.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path)
    return _csv(path) if suffix in (".csv", ".tsv") else _json(path)


def read_text(path: Path, size: int = 1 << 16) -> Iterator[str]:
    """A file of text, in pieces of about `size` characters, cut at the end of a line.

    Raises:
        InputError: it is none, or it is of another format by its name or its start.
    """
    if suffix_of(path) not in TEXT:
        raise InputError(
            f"{path} has an unknown ending: {', '.join(SUFFIXES)} are read, also compressed."
        )
    with _opened(path) as file:
        first = True
        while piece := file.read(size):
            piece += file.readline(size)
            if "\0" in piece:
                raise InputError(f"{path} is binary, not text.")
            if first and _starts_as_json(piece):
                raise InputError(f"{path} holds JSON, not text: name it .jsonl or .json.")
            first = False
            yield piece


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _starts_as_json(text: str) -> bool:
    try:
        found, _ = json.JSONDecoder().raw_decode(re.sub(r"^\s*\[?\s*", "", text))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict)


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A file as text: unpacked, and without the mark of its encoding."""
    try:
        with _unpacked(path) as raw:
            head = raw.read(4)
        encoding = next((e for mark, e in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
        with _unpacked(path) as raw, io.TextIOWrapper(raw, encoding, newline=newline) as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                at = raw.tell() - len(error.object) + error.start
                raise InputError(f"{path} is not UTF-8 text (byte {at}).") from None
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None


def _unpacked(path: Path) -> IO[bytes]:
    """By the file's own first bytes, whatever its name says."""
    with path.open("rb") as file:
        head = file.read(8)
    opener = next((o for magic, o in _PACKED.items() if head.startswith(magic)), None)
    return opener(path, "rb") if opener else path.open("rb")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines, an array of objects, or one object over several lines."""
    with _opened(path) as file:
        lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        rows = (
            (f"line {n}", parse_json(line, f"{path}, line {n}"))
            for n, line in itertools.chain([first], lines)
        )
        if first[1].lstrip().startswith("[") or (
            suffix_of(path) == ".json" and not _starts_as_json(first[1])
        ):
            found = parse_json(first[1] + file.read(), str(path))
            listed = found if isinstance(found, list) else [found]
            rows = ((f"row {n}", row) for n, row in enumerate(listed, 1))
        for where, row in rows:
            if not isinstance(row, dict):
                raise InputError(f"{path}, {where}: not a JSON object.")
            yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows by the names in the first line; an empty cell is none."""
    csv.field_size_limit(1 << 30)
    with _opened(path, newline="") as file:
        head = file.readline()
        rows = csv.DictReader(
            itertools.chain([head], file), delimiter=max(",;\t", key=head.count), strict=True
        )
        try:
            names = rows.fieldnames or []
            if twice := [n for n in names if names.count(n) > 1]:
                raise InputError(f"{path} names two columns {twice[0]!r}: rename one.")
            for number, row in enumerate(rows, 1):
                if None in row:
                    raise InputError(f"{path}, row {number} has more cells than the first line.")
                yield {k: v or None for k, v in row.items()}
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}: not CSV ({error}).") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    parquet = optional("pyarrow.parquet", "Reading .parquet needs", "data")
    from pyarrow import ArrowException

    try:
        with _unpacked(path) as raw:
            for batch in parquet.ParquetFile(raw).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (OSError, EOFError, ValueError, OverflowError, ArrowException) as error:
        raise InputError(f"{path} cannot be read as parquet ({one_line(error)}).") from None


def load_saved(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        InputError: it is damaged, or has no such split.
    """
    datasets = _datasets(str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder may raise anything
        raise InputError(f"The data set {folder} cannot be read: {one_line(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if split not in found:
            raise InputError(f"{folder} has no split {split!r}; there are {', '.join(found)}.")
        found = found[split]
    yield from found


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    return any((folder / f).is_file() for f in ("dataset_dict.json", "state.json"))


def load_hub(where: str, default_split: str = "train") -> Iterator[dict[str, Any]]:
    """Rows of `owner/name[:config][@split][^revision]`, streamed.

    Raises:
        InputError: the data set cannot be reached or has no such split or config.
    """
    datasets = _datasets(where)
    where, _, revision = where.partition("^")
    where, _, split = where.partition("@")
    name, _, config = where.partition(":")
    try:
        yield from datasets.load_dataset(
            name, config or None, split=split or default_split, streaming=True,
            revision=revision or None,
        )  # fmt: skip
    except Exception as error:  # any loader may raise anything
        raise InputError(
            f"{name} is no file here and cannot be loaded as a hub data set: {one_line(error)}"
        ) from None


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"There is no file {where}; data sets need: pip install 'hlora[data]'."
        ) from None
    return datasets
