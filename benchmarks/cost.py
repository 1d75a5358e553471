"""The one file that the benchmarks of the cost write: results/cost.json, a part for each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hlora.files import write_json

COST = "results/cost.json"


def parser(doc: str) -> argparse.ArgumentParser:
    """Of a benchmark with that docstring: it says where the file is."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--json", default=COST, help=f"the file of all parts ({COST})")
    return made


def read(path: str) -> dict[str, Any]:
    """All parts. None is there before the first benchmark has run."""
    file = Path(path)
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def keep(path: str, part: str, content: dict[str, Any]) -> None:
    """Put a part in the place of the one that an earlier run left."""
    write_json(Path(path), {**read(path), part: content})
