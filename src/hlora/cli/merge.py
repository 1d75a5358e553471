"""`hlora merge`: an adapter added to its base model's weights."""

from __future__ import annotations

from hlora.cli.screen import say
from hlora.run.merge import merge
from hlora.run.settings import MergeSettings


def run(settings: MergeSettings) -> None:
    """Merge, and say where the model is."""
    done = merge(settings)
    say(f"Merged into a model of {done.parameters:,} parameters in {done.folder}.")
