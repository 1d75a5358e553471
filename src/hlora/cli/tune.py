"""`hlora tune`: the domain phase."""

from __future__ import annotations

from hlora.run.phases import DomainPhase
from hlora.run.settings import TuneSettings


def run(settings: TuneSettings) -> None:
    """Tune, and print how it went."""
    phase = DomainPhase(settings)
    if settings.dry_run:
        print(phase.plan())
        return
    held = [f"φ {p.phi:g}, anchored at {p.anchor}" for p in phase.regularizers]
    print(
        f"Tuning on {len(phase.rows):,} rows of {phase.task.name} ({phase.rows.tokens:,} tokens), "
        f"{held[0] if held else 'plain LoRA'}."
    )
    trained = phase.run()
    last = trained.log[-1] if trained.log else {}
    print(
        f"Tuned {trained.steps} steps in {trained.seconds:.0f} s into {settings.output}."
        + (f" Last loss {last['loss']:.4g}" if last else "")
        + (f", R {last['R']:.4g}, penalty {last['penalty']:.4g}." if "R" in last else "")
    )
