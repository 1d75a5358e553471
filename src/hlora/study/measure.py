"""One run of a study: phase ν if it is not there yet, phase μ, and scores against the base."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hlora.core import store
from hlora.core.adapter_file import ADAPTER_FILES
from hlora.errors import HloraError, visible
from hlora.files import write_whole
from hlora.hf.peft import scale_adapter, scale_from
from hlora.run import basepass, machine
from hlora.run.convert import convert
from hlora.run.evaluate import TextScore, best, figures_of, pooled_forgetting
from hlora.run.models import load_adapter
from hlora.run.phases import TUNED, record, tune
from hlora.run.scoring import prepare, score
from hlora.run.settings import ConvertSettings
from hlora.study import spec
from hlora.study.lines import groups_of_text
from hlora.study.methods import METHODS
from hlora.study.spec import Run, Study

LOGGED = ("step", "loss", "R", "penalty", "total_loss")
"""What is kept of each log entry: Fig. 4."""


def run_one(study: Study, run: Run) -> dict[str, Any]:
    """One run, whatever happens: a failure is a result with its reason."""
    began = time.monotonic()
    try:
        with _logged(study, run.title):
            result = {**_heading(study, run), **_measured(study, run)}
    except Exception as error:
        result = failed(study, run, error)
    result["seconds_total"] = round(time.monotonic() - began, 1)
    return result


def failed(study: Study, run: Run, error: BaseException) -> dict[str, Any]:
    """The line of a run that failed; a traceback goes to errors.txt beside the work."""
    if isinstance(error, BrokenProcessPool):
        said = "Its process was killed, as the system does when memory is short: fewer --jobs."
    elif isinstance(error, HloraError):
        said = str(error)
    else:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        text = "".join(traceback.format_exception(error))
        with (Path(study.work) / "errors.txt").open("a", encoding="utf-8") as file:
            file.write(f"== {run.title}\n{text}\n")
    return {**_heading(study, run), "error": said, "seconds_total": 0.0}


def _heading(study: Study, run: Run) -> dict[str, Any]:
    return {
        "key": spec.key_of(study, run), "run": asdict(run), "label": METHODS[run.method].label,
        "error": None, "study": study.settings(), "task_files": study.tasks[run.task],
        "seen": list(study.general), "unseen": study.unseen, "versions": machine.versions(),
        "machine": machine.describe(),
    }  # fmt: skip


def _measured(study: Study, run: Run) -> dict[str, Any]:
    method = METHODS[run.method]
    base = base_scores(study, run.task)
    if not method.trains:
        return {"settings": {}, **_summary(study, base, base)}
    nu = phase_nu(study, run.method, run.seed)
    tuned: dict[str, Any] = {}
    if method.tune is None:
        assert nu is not None
        adapter = nu
    else:
        machine.reset_peak()
        adapter = phase_mu(study, spec.whole(run))
        tuned = json.loads((adapter / TUNED).read_text("utf-8"))
        tuned["peak"] = machine.peak_bytes()
    recorded = store.read_info(nu) if nu else {"settings": None, "summary": {}, "norms": {}}
    summary = recorded["summary"]
    size = {"importance_bytes": recorded["files"][store.TENSORS]["bytes"]} if nu else {}
    return {
        "settings": {"record": recorded["settings"], "tune": tuned.get("settings")},
        "seconds": {"record": summary.get("seconds"), "tune": tuned.get("seconds")},
        "steps": tuned.get("steps", 0), "recorded": summary, **size,
        "adapter_bytes": (adapter / ADAPTER_FILES[1]).stat().st_size,
        "peak_bytes": tuned.get("peak"), "budgeted": tuned.get("forgetting"),
        "log": [{k: _short(e[k]) for k in LOGGED if k in e} for e in tuned.get("log", [])],
        "norms": {k: _short(v) for k, v in recorded["norms"].items()},
        **_summary(
            study, base,
            _scores(
                study, run.task, adapter,
                1.0 if run.phi is None or not method.rewinds else run.phi,
                nu if method.back_to_nu else None,
            ),
        ),
    }  # fmt: skip


def phase_mu(study: Study, run: Run) -> Path:
    """The adapter's folder of a run, made if it is not there yet."""
    adapter = spec.mu_folder(study, run)
    if not _finished(adapter, TUNED):
        tune(spec.tune_settings(study, run, phase_nu(study, run.method, run.seed)))
    return adapter


def phase_nu(study: Study, method: str, seed: int) -> Path | None:
    """The importance folder of a method and seed, made if it is not there yet; None without one."""
    if METHODS[method].record is None:
        return None
    folder = spec.nu_folder(study, method, seed)
    if not _finished(folder, store.MARKER):
        with _logged(study, f"phase ν of {method}, seed {seed}"):
            machine.reset_peak()
            record(spec.record_settings(study, method, seed))
    if not METHODS[method].ones:
        return folder
    ones = folder.with_name(f"{folder.name}-ones")
    if not (ones / store.MARKER).exists():
        with _logged(study, f"Ω = 1 of {method}, seed {seed}"):
            convert(ConvertSettings(folder=str(folder), to="ones", output=str(ones)))
    return ones


def _finished(folder: Path, marker: str) -> bool:
    """Whether a phase was made and cleaned up after: a kill may have come between."""
    return (folder / marker).exists() and not (folder / "checkpoints").exists()


def base_scores(study: Study, task: str) -> dict[str, Any]:
    """Of the base model, kept: every run is compared with them."""
    what = {
        "model": study.model, "held_out": study.held_out, "task": study.tasks[task],
        "others": study.others, "eval": study.eval, "digests": study.digests,
    }  # fmt: skip
    path = Path(study.work) / "base" / f"{spec.digest(what)}.json"
    if not path.exists():
        # NaN and all: it is read by nobody else, and an accuracy that is none stays so.
        write_whole(path, json.dumps(_scores(study, task, None)))
    return json.loads(path.read_text("utf-8"))


def _scores(
    study: Study, task: str, adapter: Path | None, scale: float = 1.0, start: Path | None = None
) -> dict[str, Any]:
    """Scores as plain values, those of each block of text and of each question included.

    Args:
        scale: what the adapter's change is multiplied by.
        start: an adapter that the change begins at; the base model without one.
    """
    settings = spec.eval_settings(study, task)
    model, tokenizer, kinds, tasks = prepare(settings)
    if adapter is not None:
        model = load_adapter(model, adapter, others=True)
        if start is None:
            scale_adapter(model, scale)
        else:
            scale_from(model, start, scale)
    scores = _all_scores(
        study, model, tokenizer, kinds, tasks, settings.batch_size, adapter is not None
    )
    of_task, *others = scores["task"].values()
    return {
        "text": {k: asdict(s) for k, s in scores["text"].items()},
        "task": figures_of(of_task),
        "answers": [best(lls) for lls in of_task.items],
        "losses": [-lls[e.answer] for e, lls in zip(tasks[0].examples, of_task.items, strict=True)],
        "others": {
            name: {**figures_of(s), "answers": [best(lls) for lls in s.items]}
            for name, s in zip(study.others, others, strict=True)
        },
    }


def _all_scores(
    study: Study,
    model: Any,
    tokenizer: Any,
    kinds: dict[str, Any],
    tasks: list[Any],
    size: int,
    adapted: bool,
) -> dict[str, Any]:
    """The base model's predictions are kept, and serve every adapter."""
    digests = {v: study.digests.get(v) for v in study.held_out.values()}
    what = {"model": study.model, "held_out": study.held_out, "eval": study.eval, "of": digests}
    folder = Path(study.work) / "base" / spec.digest(what)
    paths = {kind: folder / f"{i}.safetensors" for i, kind in enumerate(kinds)}
    if adapted:
        before = {kind: basepass.logits(model, path) for kind, path in paths.items()}
        return score(model, tokenizer, kinds, tasks, size, True, before)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, reads: basepass.Reads) -> None:
        reads.save(paths[kind])

    return score(model, tokenizer, kinds, tasks, size, keep=keep)


def _summary(study: Study, base: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    pairs = {
        k: (TextScore(**base["text"][k]), TextScore(**after["text"][k])) for k in study.held_out
    }
    groups = {k: [k] for k in study.held_out}
    groups |= groups_of_text(list(study.held_out), list(study.general))
    return {
        "text": {
            k: {
                **figures_of(after), "blocks": [_short(b) for b in after.blocks],
                "divergences": [_short(d) for d in after.divergences],
            }
            for k, (_, after) in pairs.items()
        },
        "task": after["task"],
        "answers": after.get("answers", []),
        "losses": [_short(n) for n in after.get("losses", [])],
        "others": after.get("others", {}),
        "forgetting": {
            name: asdict(pooled_forgetting([pairs[k] for k in kinds]))
            for name, kinds in groups.items()
            if kinds
        },
    }  # fmt: skip


@contextlib.contextmanager
def _logged(study: Study, title: str) -> Any:
    """What the commands print goes to a log beside the work."""
    path = Path(study.work) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        print(f"== {visible(title)}")
        yield


def _short(value: float) -> float:
    """Six digits: a results file is kept in the repository."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
