"""The kinds of importance by name. A new kind is a file and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hlora.errors import refuse_unknown

if TYPE_CHECKING:
    from hlora.core.importance import Importance

KINDS = {
    "dense": "hlora.core.importance.dense:Dense",
    "factored": "hlora.core.importance.factored:Factored",
    "entries": "hlora.core.importance.entries:Entries",
    "fisher": "hlora.core.importance.fisher:Fisher",
    "laplace": "hlora.core.importance.entries:Laplace",
    "kronecker": "hlora.core.importance.kronecker:Kronecker",
    "sketch": "hlora.core.importance.sketch:Sketch",
    "blend": "hlora.core.importance.blend:Blend",
}
"""Name → `module:class`, imported on first use: the help screen lists them without torch."""


def kind_named(name: str) -> type[Importance]:
    """The class of a kind.

    Raises:
        InputError: there is no such kind; those that exist are listed.
    """
    refuse_unknown([name], KINDS, "Unknown kind of importance")
    module, _, cls = KINDS[name].partition(":")
    return getattr(import_module(module), cls)
