"""What is shown in a terminal: names, paths and errors are text, never its commands or markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from hlora.errors import visible


class Screen(Console):
    """A console that takes text for text: no `[markup]`, no `:emoji:`, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(visible(text), **settings)


def say(text: str) -> None:
    """Print text."""
    print(visible(text))
