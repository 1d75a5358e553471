"""LoRA fine-tuning of language models that does not forget.

Attach `Record` to a Trainer for the general text and `Penalty` for the domain.
https://arxiv.org/abs/2501.13669
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlora.core.regularizer import Pull, Regularizer
    from hlora.core.store import Stored, load
    from hlora.errors import (
        HloraError,
        InputError,
        MismatchError,
        StoreError,
        UnsupportedModelError,
    )
    from hlora.hf.attach import attach
    from hlora.hf.record import Record
    from hlora.hf.regularize import Penalty

__version__ = "0.1.0"

_WHERE = {
    "Penalty": "hlora.hf.regularize",
    "Pull": "hlora.core.regularizer",
    "Record": "hlora.hf.record",
    "Regularizer": "hlora.core.regularizer",
    "Stored": "hlora.core.store",
    "attach": "hlora.hf.attach",
    "load": "hlora.core.store",
    **dict.fromkeys(
        ("HloraError", "InputError", "MismatchError", "StoreError", "UnsupportedModelError"),
        "hlora.errors",
    ),
}

__all__ = [
    "HloraError",
    "InputError",
    "MismatchError",
    "Penalty",
    "Pull",
    "Record",
    "Regularizer",
    "StoreError",
    "Stored",
    "UnsupportedModelError",
    "attach",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `hlora --help` must not wait for torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'hlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
