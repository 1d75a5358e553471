"""The folders that a command writes to, which go again where nothing came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from hlora.files import take_away, unlock

S = TypeVar("S")
T = TypeVar("T")

NOTHING = "Nothing of this run was kept: the same command starts again."
"""What is said of a run that was stopped before it kept anything."""


def whole(folder: Path) -> str:
    """What is said of a run that was stopped when it had its result."""
    return f"The result is whole, in {folder}."


@contextmanager
def leaving(settings: Any) -> Iterator[None]:
    """However it ends, unlock what these settings write to, and take away what stayed empty."""
    try:
        yield
    finally:
        given = vars(settings)
        for name in ("record", "output"):
            if given.get(name):
                unlock(Path(given[name]))
                take_away(Path(given[name]))
        if given.get("json"):
            take_away(Path(given["json"]).parent)


def tidied(run: Callable[[S], T]) -> Callable[[S], T]:
    """The same function of settings, which leaves no empty folder behind."""

    @wraps(run)
    def tidy(settings: S) -> T:
        with leaving(settings):
            return run(settings)

    return tidy
