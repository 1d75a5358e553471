"""The one file that the benchmarks of the cost write: results/cost.json, a part for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hlora.files import write_json

COST = "results/cost.json"


def read(path: str) -> dict[str, Any]:
    """All parts. None is there before the first benchmark has run."""
    file = Path(path)
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def keep(path: str, part: str, content: dict[str, Any]) -> None:
    """Put a part in the place of the one that an earlier run left."""
    write_json(Path(path), {**read(path), part: content})
