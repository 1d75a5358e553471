"""The demo's general text, as files: its commands can then be copied and run."""

from __future__ import annotations

from pathlib import Path

from hlora.data.pythontext import python_text
from hlora.files import write_whole

SEEN = ("docs", "docstrings")
"""What phase ν reads."""
UNSEEN = "code"
"""Kept from all training, the kind least like the others."""


def write_general(folder: Path) -> None:
    """Write `KIND.train.txt` for the seen kinds and `KIND.test.txt` for all."""
    for kind in SEEN:
        write_whole(folder / f"{kind}.train.txt", python_text(kind, "train"))
    for kind in (*SEEN, UNSEEN):
        write_whole(folder / f"{kind}.test.txt", python_text(kind, "test"))
