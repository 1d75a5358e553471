"""`hlora study`: the compared methods over tasks, seeds and φ."""

from __future__ import annotations

from pathlib import Path

from hlora.cli.screen import say
from hlora.errors import InputError
from hlora.run.quiet import quiet_libraries
from hlora.run.settings import StudySettings
from hlora.study.spec import read_study, runs_of


def run(settings: StudySettings) -> None:
    """Run what the results lack, and say how many failed."""
    study = read_study(Path(settings.file))
    if settings.dry_run:
        for one in runs_of(study):
            say(one.title)
        say(f"{len(runs_of(study))} runs.")
        return
    from hlora.study.runner import run_study  # torch, which a dry run does not need

    results = Path(settings.results or Path("results") / f"{Path(settings.file).stem}.jsonl")
    found = run_study(study, results, jobs=settings.jobs, prepare=quiet_libraries)
    latest = {r["key"]: r for r in found}  # a run that failed once may have been made since
    failed = [r for r in latest.values() if r["error"]]
    say(f"{len(latest) - len(failed)} runs in {results}.")
    if failed:
        raise InputError(
            f"{len(failed)} runs failed, the first with: {failed[0]['error']} Run the "
            "command again to retry them."
        )
