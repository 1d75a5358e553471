"""Packages of the extra `report`, imported where they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hlora.errors import InputError


def extra(module: str, what: str) -> Any:
    """The module; InputError says that `what` needs its package."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"{what} need {package}: pip install 'hlora[report]'.") from None
