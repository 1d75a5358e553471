"""LoRA fine-tuning of language models that does not forget.

Two callbacks for transformers' Trainer (and TRL's): `Record` for the general text, `Penalty`
for the domain. https://arxiv.org/abs/2501.13669
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlora.core.store import Stored, load
    from hlora.errors import (
        HloraError,
        InputError,
        MismatchError,
        StoreError,
        UnsupportedModelError,
    )
    from hlora.hf.penalty import Penalty
    from hlora.hf.record import Record

__version__ = "0.1.0"

_WHERE = {
    "Penalty": "hlora.hf.penalty",
    "Record": "hlora.hf.record",
    "Stored": "hlora.core.store",
    "load": "hlora.core.store",
    "HloraError": "hlora.errors",
    "InputError": "hlora.errors",
    "MismatchError": "hlora.errors",
    "StoreError": "hlora.errors",
    "UnsupportedModelError": "hlora.errors",
}

__all__ = [
    "HloraError",
    "InputError",
    "MismatchError",
    "Penalty",
    "Record",
    "StoreError",
    "Stored",
    "UnsupportedModelError",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `hlora --help` must not wait for torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'hlora' has no attribute {name!r}")
