"""`hlora convert`: an importance folder in another form."""

from __future__ import annotations

from hlora.cli.screen import say
from hlora.files import size
from hlora.run.convert import convert
from hlora.run.settings import ConvertSettings


def run(settings: ConvertSettings) -> None:
    """Convert, and print both sizes."""
    before, after = convert(settings)
    say(f"{size(before)} became {size(after)} in {settings.output}.")
