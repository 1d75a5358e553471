"""`hlora record`: the general phase."""

from __future__ import annotations

from hlora.cli.screen import say
from hlora.core.kinds import kind_named
from hlora.core.pairs import describe
from hlora.core.recorder import describe_summary
from hlora.files import size
from hlora.hf.distributed import is_main
from hlora.run.phases import GeneralPhase
from hlora.run.settings import RecordSettings


def run(settings: RecordSettings) -> None:
    """Record, and print what was found."""
    if settings.kind and not kind_named(settings.kind).trained and not is_main():
        return  # one process gathers it, and writes
    phase = GeneralPhase(settings)
    if settings.dry_run:
        say(phase.plan())
        return
    read = [f"{name} {len(b):,}" for name, b in phase.texts.items()]
    read += [f"{phase.own:,} that the model writes"] if phase.own else []
    matrices = len(describe(phase.pairs))
    say(
        f"Recording on {len(phase.rows):,} rows of {phase.tokens.shape[1]} tokens ("
        f"{', '.join(read)}), {matrices} matrices, {size(phase.held)} of importance."
    )
    done = phase.run()
    if is_main():
        say(describe_summary(done.kind, done.summary))
        seconds = done.summary["seconds"]
        say(f"{seconds:.0f} s, {size(done.bytes)} on disk in {done.folder}.")
