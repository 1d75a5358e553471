"""Results as JSON lines: one a run, on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hlora.errors import InputError


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs in a results file; a half-written last line is passed over.

    Raises:
        InputError: a line that is no JSON object, by its number.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as results ({error}).") from None
    results = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON.") from None
            continue
        if not isinstance(result, dict):
            raise InputError(f"{path}, line {number}: not a JSON object.")
        results.append(result)
    return results


def drop_half_line(path: Path) -> None:
    """What a killed study left of its last line."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def append(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
