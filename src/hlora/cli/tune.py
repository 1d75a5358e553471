"""`hlora tune`: the domain phase."""

from __future__ import annotations

from pathlib import Path

from hlora.cli.screen import say
from hlora.core.card import give_or_take
from hlora.core.recorder import describe_summary
from hlora.hf.regularize import Penalty
from hlora.run.phases import DomainPhase
from hlora.run.settings import TuneSettings

FORM = ".4f .4f"


def _said(penalty: Penalty) -> str:
    budget = penalty.forget_at_most
    how = f"φ {penalty.phi:g}" if budget is None else f"forgetting at most {budget:g}"
    return f"{how}, anchored at {penalty.anchor}"


def run(settings: TuneSettings) -> None:
    """Tune, and print how it went."""
    phase = DomainPhase(settings)
    if settings.dry_run:
        say(phase.plan())
        return
    held = [_said(p) for p in phase.regularizers]
    if len(held) > 1:
        held = [f"{Path(i).name}: {h}" for i, h in zip(settings.importance, held, strict=True)]
    say(
        f"Tuning on {len(phase.rows):,} rows of {phase.task.name} ({phase.rows.tokens}), "
        f"{'; '.join(held) or 'plain LoRA'}."
    )
    trained = phase.run()
    last = trained.log[-1] if trained.log else {}
    say(
        f"Tuned {trained.steps} steps in {trained.seconds:.0f} s into {settings.output}."
        + (f" Last loss {last['loss']:.4g}" if last else "")
        + (f", R {last['R']:.4g}, penalty {last['penalty']:.4g}." if "R" in last else "")
    )
    if phase.recorder and phase.recorder.summary:
        summary = describe_summary(phase.recorder.kind, phase.recorder.summary)
        say(f"{summary}\nIts importance is in {settings.record}.")
    if lost := trained.forgetting:
        measured = give_or_take(lost["measured"], lost["measured_se"], FORM)
        share = lost["share"] or 0.0
        scaled = f"; scaled by {share:.3f} to {give_or_take(lost['kept'], form=FORM)}"
        say(
            f"Forgetting, nats per token: {give_or_take(lost['predicted'], form=FORM)} predicted, "
            f"{measured} measured{scaled if share < 1 else ''}."
        )
