"""LoRA fine-tuning of language models that does not forget.

Attach `Record` to a Trainer for the general text and `Penalty` for the domain.
https://arxiv.org/abs/2501.13669
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlora.core.regularizer import Pull as Pull
    from hlora.core.regularizer import Regularizer as Regularizer
    from hlora.core.store import Stored as Stored
    from hlora.core.store import load as load
    from hlora.errors import *  # noqa: F403
    from hlora.hf.attach import attach as attach
    from hlora.hf.record import Record as Record
    from hlora.hf.regularize import Penalty as Penalty

__version__ = "0.1.0"

_ERRORS = (
    "DivergedError", "HloraError", "HubError", "InputError", "MismatchError", "StoreError",
    "UnsupportedModelError",
)  # fmt: skip
_WHERE = {
    "Penalty": "hlora.hf.regularize",
    "Pull": "hlora.core.regularizer",
    "Record": "hlora.hf.record",
    "Regularizer": "hlora.core.regularizer",
    "Stored": "hlora.core.store",
    "attach": "hlora.hf.attach",
    "load": "hlora.core.store",
    **dict.fromkeys(_ERRORS, "hlora.errors"),
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Import on first use: `hlora --help` must not wait for torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'hlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
