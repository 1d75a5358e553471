"""Model × method × task × seed × φ, as one JSON line a run.

A study that was stopped goes on where it was; a run that fails is noted with its reason and the
others go on. Runs that need the same phase ν share it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hlora import __version__
from hlora.config import ConvertSettings, EvalSettings, RecordSettings, TuneSettings
from hlora.errors import HloraError, InputError
from hlora.files import write_json
from hlora.methods import METHODS, Method
from hlora.options import build


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes:
        model: as for --model.
        general: kinds of text that phase ν reads, by name.
        held_out: kinds that forgetting is measured on; those that `general` lacks are unseen.
        tasks: name → {train, test}.
        methods: names from `hlora.methods`.
        seeds: one run each.
        phi: values for the methods that sweep; [] for the default.
        record, tune, eval: settings of these commands.
        work: a folder for what is in between.
    """

    model: str
    general: dict[str, str]
    held_out: dict[str, str]
    tasks: dict[str, dict[str, str]]
    methods: list[str]
    seeds: list[int]
    work: str
    phi: list[float] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)

    @property
    def unseen(self) -> list[str]:
        return [k for k in self.held_out if k not in self.general]


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    method: str
    task: str
    seed: int
    phi: float | None

    @property
    def title(self) -> str:
        phi = "" if self.phi is None else f", φ {self.phi:g}"
        return f"{METHODS[self.method].label} on {self.task}, seed {self.seed}{phi}"


def read_study(path: Path) -> Study:
    """A study from YAML.

    Raises:
        InputError: a missing or misspelt key, an unknown method (the nearest is named), or
            settings that the commands would refuse.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"The study {path} cannot be read: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"The study {path} must map names to values.")
    _known(values, [f.name for f in fields(Study)], f"{path}: unknown key")
    missing = [f.name for f in fields(Study) if f.name not in values and _required(f)]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing.")
    study = Study(**values)
    _known(study.methods, METHODS, f"{path}: unknown method")
    for name, task in study.tasks.items():
        if not isinstance(task, dict) or set(task) != {"train", "test"}:
            raise InputError(f"{path}: task {name} must name its `train` and its `test`.")
    for run in runs_of(study):  # refuse now what a command would refuse in hours
        _record_settings(study, run.method, run.seed)
        _tune_settings(study, run, Path("nu"))
    return study


def runs_of(study: Study) -> list[Run]:
    """All runs, the methods of one task and seed together."""
    runs = []
    for task in study.tasks:
        for seed in study.seeds:
            for name in study.methods:
                sweeps = METHODS[name].sweeps and study.phi
                runs += [Run(name, task, seed, phi) for phi in (study.phi if sweeps else [None])]
    return runs


def key_of(study: Study, run: Run) -> str:
    """A hash of everything that makes a run what it is."""
    what = {k: v for k, v in asdict(study).items() if k not in ("methods", "seeds", "phi", "work")}
    what["tasks"] = study.tasks[run.task]
    return _hash({**what, **asdict(run), "method_settings": asdict(METHODS[run.method])})


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished runs in a results file; a half-written last line is passed over."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    results = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            results.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON.") from None
    return results


def run_study(study: Study, results: Path, *, jobs: int = 1) -> list[dict[str, Any]]:
    """All runs that `results` lacks, `jobs` at once; returns everything that it then holds."""
    _drop_half_line(results)
    done = {r["key"] for r in read_results(results) if not r.get("error")}
    todo = [r for r in runs_of(study) if key_of(study, r) not in done]
    stages = _stages(study, todo)
    began, finished = time.monotonic(), 0
    total = len(todo)
    print(f"{total} runs to do, {len(done)} done; {len(stages[1])} phases ν.", flush=True)
    with _pool(jobs) as pool:
        for stage in stages:
            _prepare(pool, stage)
        for result in _results(pool, study, todo):
            finished += 1
            _append(results, result)
            left = (time.monotonic() - began) / finished * (total - finished)
            said = result["error"] or f"{result['seconds_total']:.0f} s"
            print(
                f"[{finished}/{total}, {left / 60:.0f} min left] "
                f"{Run(**result['run']).title}: {said}",
                flush=True,
            )
    return read_results(results)


def _pool(jobs: int) -> contextlib.AbstractContextManager[ProcessPoolExecutor | None]:
    if jobs == 1:
        return contextlib.nullcontext(None)
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def _stages(study: Study, todo: list[Run]) -> list[list[tuple[Any, ...]]]:
    """What runs share, as calls: each stage needs the one before, and no call is made twice."""
    base = [(_base_scores, study, task) for task in dict.fromkeys(r.task for r in todo)]
    phases: list[dict[Any, tuple[Any, ...]]] = [{}, {}, {}]
    for run in todo:
        of = METHODS[run.method]
        if of.record is None:
            continue
        # Those at θ^ν need the plain phase ν; Ω = 1 is made from a finished one.
        stage = 2 if of.ones else 1 if of.after_nu else 0
        folder = _nu_folder(study, run.method, run.seed)
        phases[stage].setdefault(folder, (_phase_nu, study, run.method, run.seed))
    return [base, *(list(of.values()) for of in phases)]


def _prepare(pool: ProcessPoolExecutor | None, calls: list[tuple[Any, ...]]) -> None:
    """One that fails is tried again, and its reason noted, by the runs that need it."""
    if pool is None:
        for call, *args in calls:
            with contextlib.suppress(Exception):
                call(*args)
        return
    for future in [pool.submit(call, *args) for call, *args in calls]:
        future.exception()


def _results(
    pool: ProcessPoolExecutor | None, study: Study, todo: list[Run]
) -> Iterable[dict[str, Any]]:
    if pool is None:
        yield from (run_one(study, run) for run in todo)
    else:
        for future in as_completed([pool.submit(run_one, study, run) for run in todo]):
            yield future.result()


def run_one(study: Study, run: Run) -> dict[str, Any]:
    """One run, whatever happens: a failure is a result with its reason."""
    began = time.monotonic()
    result: dict[str, Any] = {
        "key": key_of(study, run), "run": asdict(run), "label": METHODS[run.method].label,
        "model": study.model, "seen": list(study.general), "unseen": study.unseen,
        "hlora_version": __version__, "error": None,
    }  # fmt: skip
    try:
        with _logged(study, run.title):
            result |= _measured(study, run)
    except HloraError as error:
        result["error"] = str(error)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with (Path(study.work) / "errors.txt").open("a", encoding="utf-8") as file:
            file.write(f"== {run.title}\n{traceback.format_exc()}\n")
    result["seconds_total"] = round(time.monotonic() - began, 1)
    return result


def _measured(study: Study, run: Run) -> dict[str, Any]:
    import torch

    from hlora import store
    from hlora.commands import tune

    method = METHODS[run.method]
    base = _base_scores(study, run.task)
    if method.record is None:
        return {"settings": {}, **_summary(study, base, base)}
    nu = _phase_nu(study, run.method, run.seed)
    adapter = Path(study.work) / "mu" / key_of(study, run)
    settings = _tune_settings(study, run, nu)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not (adapter / tune.MARKER).exists():
        tune.run(settings)
    tuned = json.loads((adapter / tune.MARKER).read_text("utf-8"))
    recorded = store.read_info(nu)
    return {
        "settings": {"record": recorded["settings"], "tune": tuned["settings"]},
        "seconds": {"record": recorded["summary"].get("seconds"), "tune": tuned["seconds"]},
        "importance_bytes": recorded["files"][store.TENSORS]["bytes"],
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "log": tuned["log"], "norms": recorded["norms"],
        "versions": {"torch": torch.__version__},
        **_summary(study, base, _scores(study, run.task, adapter)),
    }  # fmt: skip


def _phase_nu(study: Study, method: str, seed: int) -> Path:
    """The importance folder of a method and seed, made if it is not there yet."""
    from hlora.commands import convert, record
    from hlora.store import MARKER

    folder = _nu_folder(study, method, seed)
    if not (folder / MARKER).exists():
        with _logged(study, f"phase ν of {method}, seed {seed}"):
            record.run(_record_settings(study, method, seed))
    if not METHODS[method].ones:
        return folder
    ones = folder.with_name(f"{folder.name}-ones")
    if not (ones / MARKER).exists():
        convert.run(ConvertSettings(folder=str(folder), to="ones", output=str(ones)))
    return ones


def _nu_folder(study: Study, method: str, seed: int) -> Path:
    of = METHODS[method]
    what = {
        "model": study.model, "general": study.general, "record": study.record,
        "method": dict(of.record or {}), "seed": seed, "after_nu": of.after_nu,
    }  # fmt: skip
    return Path(study.work) / "nu" / _hash(what)


def _record_settings(study: Study, method: str, seed: int) -> RecordSettings:
    of: Method = METHODS[method]
    values: dict[str, Any] = {
        "model": study.model, "text": [f"{k}={v}" for k, v in study.general.items()],
        "output": str(_nu_folder(study, method, seed)), "seed": seed, "resume": True,
        **study.record, **(of.record or {}),
    }  # fmt: skip
    if of.after_nu:
        values["importance"] = str(_nu_folder(study, "lora-nu-mu", seed))
    return build(RecordSettings, values)


def _tune_settings(study: Study, run: Run, nu: Path) -> TuneSettings:
    values: dict[str, Any] = {
        "model": study.model, "importance": str(nu), "task": study.tasks[run.task]["train"],
        "output": str(Path(study.work) / "mu" / key_of(study, run)), "seed": run.seed,
        "resume": True, **study.tune, **METHODS[run.method].tune,
    }  # fmt: skip
    if run.phi is not None:
        values["phi"] = run.phi
    return build(TuneSettings, values)


def _eval_settings(study: Study, task: str) -> EvalSettings:
    return build(
        EvalSettings,
        {
            "model": study.model, "text": [f"{k}={v}" for k, v in study.held_out.items()],
            "task": [study.tasks[task]["test"]], **study.eval,
        },
    )  # fmt: skip


def _base_scores(study: Study, task: str) -> dict[str, Any]:
    """Of the base model, kept: every run is compared with them."""
    what = {"model": study.model, "held_out": study.held_out, "task": study.tasks[task]}
    path = Path(study.work) / "base" / f"{_hash({**what, 'eval': study.eval})}.json"
    if not path.exists():
        write_json(path, _scores(study, task, None))
    return json.loads(path.read_text("utf-8"))


def _scores(study: Study, task: str, adapter: Path | None) -> dict[str, Any]:
    """Scores as plain values, the loss of each block of text included."""
    from hlora.commands.eval import prepare, score

    settings = _eval_settings(study, task)
    model, tokenizer, kinds, tasks = prepare(settings)
    if adapter is not None:
        from hlora.models import load_adapter

        model = load_adapter(model, adapter)
    scores = score(model, tokenizer, kinds, tasks, settings.batch_size)
    return {
        "text": {k: asdict(s) for k, s in scores["text"].items()},
        "task": next(iter(scores["task"].values())).asdict(),
    }


def _summary(study: Study, base: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    from hlora.evaluate import TextScore, pooled_forgetting

    pairs = {
        k: (TextScore(**base["text"][k]), TextScore(**after["text"][k])) for k in study.held_out
    }
    groups = {k: [k] for k in study.held_out}
    groups |= {"seen": [k for k in study.held_out if k in study.general], "unseen": study.unseen}
    return {
        "text": {k: after.asdict() for k, (_, after) in pairs.items()},
        "task": after["task"],
        "forgetting": {
            name: asdict(pooled_forgetting([pairs[k] for k in kinds]))
            for name, kinds in groups.items()
            if kinds
        },
    }


@contextlib.contextmanager
def _logged(study: Study, title: str) -> Any:
    """What the commands print goes to a log beside the work."""
    path = Path(study.work) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        print(f"== {title}")
        yield


def _drop_half_line(path: Path) -> None:
    """What a killed study left of its last line."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _append(path: Path, result: dict[str, Any]) -> None:
    """One line, on the disk before the next run begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _hash(what: Any) -> str:
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _required(f: Any) -> bool:
    from dataclasses import MISSING

    return f.default is MISSING and f.default_factory is MISSING


def _known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.4)
            raise InputError(
                f"{what} {name!r}"
                + (f"; did you mean {near[0]}?" if near else f": there are {', '.join(known)}.")
            )
