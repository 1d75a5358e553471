"""All runs of a study, and what they share made once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from hlora.errors import visible
from hlora.files import lock, unlock
from hlora.study.lines import Line, append, drop_half_line, read_lines
from hlora.study.measure import base_scores, failed, phase_mu, phase_nu, run_one
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS
from hlora.study.pool import Call, outcomes
from hlora.study.spec import Run, Study, key_of, mu_folder, nu_folder, runs_of, whole


def run_study(
    study: Study, results: Path, *, jobs: int = 1, prepare: Callable[[], None] | None = None
) -> list[Line]:
    """All runs that `results` lacks, `jobs` at once; returns everything that it then holds.

    Args:
        prepare: called first in each process that is started.

    Raises:
        InputError: another process is writing to `results`.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    lock(results)
    try:
        return _run(study, results, jobs, prepare)
    finally:
        unlock(results)


def _run(study: Study, results: Path, jobs: int, prepare: Callable[[], None] | None) -> list[Line]:
    drop_half_line(results)
    done = {r["key"] for r in read_lines(results) if not r.get("error")}
    todo = [r for r in runs_of(study) if key_of(study, r) not in done]
    stages = _stages(study, todo)
    shared = sum(len(s) for s in stages)
    began, finished, total = time.monotonic(), 0, len(todo)
    print(
        f"{total} runs to do, {len(done)} done before; first the {shared} things that they share.",
        flush=True,
    )
    for stage in stages:
        # One that fails is tried again, and its reason noted, by the runs that need it.
        for _ in outcomes(stage, jobs, prepare):
            finished += 1
            spent = (time.monotonic() - began) / 60
            print(f"[shared {finished}/{shared}, {spent:.0f} min so far]", flush=True)
    began, calls = time.monotonic(), [(run_one, study, run) for run in todo]
    for finished, (index, result) in enumerate(outcomes(calls, jobs, prepare), 1):
        if isinstance(result, BaseException):
            result = failed(study, todo[index], result)
        append(results, result)
        left = (time.monotonic() - began) / finished * (total - finished)
        said = result["error"] or f"{result['seconds_total']:.0f} s, {_figures(study, result)}"
        print(
            f"[{finished}/{total}, {left / 60:.0f} min left] "
            + visible(f"{todo[index].title}: {said}"),
            flush=True,
        )
    return read_lines(results)


def _figures(study: Study, result: Line) -> str:
    metrics = [METRICS[m] for m in study.metrics]
    found = [(m, value) for m in metrics if (value := m.of(result)) is not None]
    return ", ".join(f"{m.label} {v:{'+' if m.signed else ''}.{m.digits}f}" for m, v in found)


def _stages(study: Study, todo: list[Run]) -> list[list[Call]]:
    """What runs share: each stage needs the one before, and no call is made twice."""
    base: list[Call] = [(base_scores, study, t) for t in dict.fromkeys(r.task for r in todo)]
    phases: list[dict[Path, Call]] = [{}, {}, {}]
    for run in todo:
        of = METHODS[run.method]
        if of.record is None:
            continue
        # Those at θ^ν need the plain phase ν; Ω = 1 is made from a finished one.
        stage = 2 if of.ones else 1 if of.after_nu else 0
        folder = nu_folder(study, run.method, run.seed)
        phases[stage].setdefault(folder, (phase_nu, study, run.method, run.seed))
    # An adapter that is rewound is made once, and found by the run that is of it.
    wholes = [whole(r) for r in todo if METHODS[r.method].rewinds]
    adapters: list[Call] = [
        (phase_mu, study, run) for run in {mu_folder(study, w): w for w in wholes}.values()
    ]
    return [base, *(list(of.values()) for of in phases), adapters]
