"""`hlora tune`: the domain phase."""

from __future__ import annotations

from hlora.cli.screen import say
from hlora.run.phases import DomainPhase
from hlora.run.settings import TuneSettings


def run(settings: TuneSettings) -> None:
    """Tune, and print how it went."""
    phase = DomainPhase(settings)
    if settings.dry_run:
        say(phase.plan())
        return
    budget = settings.forget_at_most
    how = f"forgetting at most {budget:g}" if budget else "φ {0.phi:g}, anchored at {0.anchor}"
    held = [how.format(p) for p in phase.regularizers]
    say(
        f"Tuning on {len(phase.rows):,} rows of {phase.task.name} ({phase.rows.tokens}), "
        f"{held[0] if held else 'plain LoRA'}."
    )
    trained = phase.run()
    last = trained.log[-1] if trained.log else {}
    say(
        f"Tuned {trained.steps} steps in {trained.seconds:.0f} s into {settings.output}."
        + (f" Last loss {last['loss']:.4g}" if last else "")
        + (f", R {last['R']:.4g}, penalty {last['penalty']:.4g}." if "R" in last else "")
    )
    if lost := trained.forgetting:
        scaled = f"; scaled by {lost['share']:.3f} to {lost['kept']:.4f}"
        say(
            f"Forgetting, nats per token: {lost['predicted']:.4f} predicted, "
            f"{lost['measured']:.4f} ± {lost['measured_se']:.4f} measured"
            f"{scaled if lost['share'] < 1 else ''}."
        )
