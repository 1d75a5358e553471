"""`hlora rewind`: a finished adapter scaled back to a budget of forgetting."""

from __future__ import annotations

from hlora.cli.screen import say
from hlora.cli.show import show
from hlora.core.card import give_or_take
from hlora.run.rewind import rewind
from hlora.run.settings import RewindSettings


def run(settings: RewindSettings) -> None:
    """Print the curve of what is forgotten and what the domain loses, the chosen point marked."""
    done = rewind(settings)
    rows = []
    for p in done.points:
        predicted = "-" if p.predicted is None else f"{p.predicted:.4f}"
        measured = give_or_take(p.measured.nats, p.measured.se, ".4f .4f")
        nll = "-" if p.nll is None else f"{p.nll:.3f}"
        rows.append([p.way, f"{p.share:.3f}", predicted, measured, nll])
    title = "Forgetting (KL from the base model, nats per token) on the way back"
    headings = ["", "share", "predicted", "measured", "NLL of the domain"]
    show(title, headings, rows, strong=done.points.index(done.chosen))
    chosen, whole = done.chosen, next(p for p in done.points if p.share == 1)
    if chosen is whole:
        say(f"The adapter is within the budget of {settings.forget_at_most:g} as it is.")
    else:
        said = f"{chosen.way}, {chosen.share:.3f}: {chosen.measured.nats:.4f} nats per token"
        said += f" instead of {whole.measured.nats:.4f}"
        if chosen.nll is not None and whole.nll is not None:
            said += f", for {chosen.nll - whole.nll:+.3f} nats per answer of the domain"
        say(f"Taken: {said}.")
    say(f"Written to {done.folder}.")
