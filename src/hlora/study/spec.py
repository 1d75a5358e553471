"""A study file: what is compared, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hlora.core.kinds import kind_named
from hlora.data.parse import read_yaml
from hlora.errors import InputError, refuse_unknown
from hlora.files import sha256
from hlora.run.build import build, plain
from hlora.run.settings import (
    OF_TRAINING,
    EvalSettings,
    RecordSettings,
    TuneSettings,
    without_secrets,
)
from hlora.study.lines import groups_of_text
from hlora.study.methods import METHODS, Method
from hlora.study.metrics import FORGETTING, METRICS

DATA = "HLORA_DATA"
"""In the environment: where `data/...` in a study lies, instead of the study's own `data`."""
ADAPTER = {"lora_rank", "lora_alpha", "lora_dropout", "rslora", "targets"}
"""Settings that a general phase decides for the domain phase that starts from it."""


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes:
        general: kinds of text that phase ν reads, by name.
        held_out: kinds that forgetting is measured on; those that `general` lacks are unseen.
        tasks: name → {train, test}.
        methods: names from `hlora.study.methods`.
        phi: values for the methods that sweep, one list for all or method → list; empty for the
            default.
        others: tasks that are scored and never trained on: what the model could do before.
        only: method → {tasks, seeds}, for methods too dear to run on all of them.
        record, tune, eval: settings of these commands.
        work: a folder for what is in between.
        metrics: what the progress line shows of each run, names from `hlora.study.metrics`.
        data: a folder; text and tasks under `data/` are looked for there.
        digests: of the files that are read, by the name that the study gives them.

    A text or task may be a list: the first that exists counts, and what is no file (a name on
    the hub) always does.
    """

    model: str
    general: dict[str, str]
    held_out: dict[str, str]
    tasks: dict[str, dict[str, str]]
    methods: list[str]
    seeds: list[int]
    work: str
    phi: list[float] | dict[str, list[float]] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    only: dict[str, dict[str, list]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=lambda: ["acc", "nll", *FORGETTING])
    data: str = "data"
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def unseen(self) -> list[str]:
        return groups_of_text(list(self.held_out), list(self.general))["unseen"]

    def where(self, spec: str) -> str:
        """A text or task as the commands take it."""
        head, sep, rest = spec.partition("/")
        return f"{os.environ.get(DATA) or self.data}/{rest}" if head == "data" and sep else spec

    def phis(self, method: str) -> list[float | None]:
        """The values of φ of a method's runs; None leaves φ to the method."""
        if not METHODS[method].sweeps:
            return [None]
        given = self.phi.get(method, []) if isinstance(self.phi, dict) else self.phi
        return list(given) or [None]

    def runs(self, method: str, task: str, seed: int) -> bool:
        """Whether a method is run on a task with a seed."""
        only = self.only.get(method, {})
        return task in only.get("tasks", [task]) and seed in only.get("seeds", [seed])

    def settings(self) -> dict[str, Any]:
        """What every run of the study has in common, and what two studies can differ in."""
        shared = ["model", "general", "held_out", "record", "tune", "eval"]
        shared += ["others"] if self.others else []  # as the keys of earlier results were made
        return {name: getattr(self, name) for name in shared}


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
    values = read_yaml(path, "study")
    for key in ("seeds", "phi", "only", "record", "tune", "eval"):
        if key in values:
            values[key] = plain(values[key])
    for key in ("record", "tune"):
        if isinstance(values.get(key), dict) and isinstance(values[key].get("training"), dict):
            values[key]["training"] = without_secrets(values[key]["training"])
    known = [f for f in fields(Study) if f.name != "digests"]
    refuse_unknown(values, [f.name for f in known], f"{path}: unknown key")
    for f in known:
        if f.name not in values and f.default is f.default_factory is MISSING:
            raise InputError(f"{path}: {f.name} is missing.")
    _check_types(values, path)
    study = _chosen(Study(**values), path)
    refuse_unknown(study.methods, METHODS, f"{path}: unknown method")
    refuse_unknown(study.metrics, METRICS, f"{path}: unknown metric")
    refuse_unknown(study.only, study.methods, f"{path}: only names no method of the study:")
    for name, limits in study.only.items():
        if not isinstance(limits, dict) or not all(isinstance(v, list) for v in limits.values()):
            raise InputError(f"{path}: only.{name} must map tasks and seeds to lists.")
        refuse_unknown(limits, ("tasks", "seeds"), f"{path}: only.{name}: unknown key")
        refuse_unknown(limits.get("tasks", []), study.tasks, f"{path}: only.{name}: no such task")
        refuse_unknown(limits.get("seeds", []), study.seeds, f"{path}: only.{name}: no such seed")
    if isinstance(study.phi, dict):
        sweeping = [m for m in METHODS if METHODS[m].sweeps]
        refuse_unknown(study.phi, sweeping, f"{path}: phi names no method that has one:")
    for run in runs_of(study):  # refuse now what a command would refuse in hours
        if METHODS[run.method].record is not None:
            record_settings(study, run.method, run.seed)
        if METHODS[run.method].tune is not None:
            nu = None if METHODS[run.method].record is None else Path("nu")
            tune_settings(study, whole(run), nu)
        eval_settings(study, run.task)
    return study


def runs_of(study: Study) -> list[Run]:
    """All runs; seed by seed, so that a study cut short has whole tables of fewer seeds."""
    return [
        Run(name, task, seed, phi)
        for seed in study.seeds
        for task in study.tasks
        for name in study.methods
        if study.runs(name, task, seed)
        for phi in study.phis(name)
    ]


def key_of(study: Study, run: Run) -> str:
    """A hash of everything that makes a run what it is, the content of its files included."""
    task = study.tasks[run.task]
    read = {*study.general.values(), *study.held_out.values(), *study.others.values()}
    read |= set(task.values())
    method = asdict(METHODS[run.method])
    # As the keys of earlier results were made, when nothing looked that was not told to.
    for name in ("rewinds", "at", "back_to_nu"):
        if not method[name]:
            del method[name]
    if method["tune"] and not method["tune"].get("look_every", 1):
        method["tune"] = {k: v for k, v in method["tune"].items() if k != "look_every"}
    what = {
        **study.settings(), **asdict(run), "task_files": task, "method_settings": method,
        "digests": {k: v for k, v in study.digests.items() if k in read},
    }  # fmt: skip
    return digest(what)


def nu_folder(study: Study, method: str, seed: int) -> Path:
    """The importance folder that a method and a seed need; methods may share one."""
    of = METHODS[method]
    what = {
        "model": study.model, "general": study.general, "record": study.record,
        "method": dict(of.record or {}), "seed": seed, "after_nu": of.after_nu,
        "digests": {k: v for k, v in study.digests.items() if k in study.general.values()},
    }  # fmt: skip
    return Path(study.work) / "nu" / digest(what)


def record_settings(study: Study, method: str, seed: int) -> RecordSettings:
    of: Method = METHODS[method]
    values: dict[str, Any] = {
        "model": study.model, "seed": seed, "resume": True, "kind": "dense",
        "text": [f"{k}={study.where(v)}" for k, v in study.general.items()],
        "output": str(nu_folder(study, method, seed)), **study.record, **(of.record or {}),
    }  # fmt: skip
    if kind_named(values["kind"]).trained:
        values.pop("sequences", None)  # the study's are for the methods that take some
    else:
        values = {k: v for k, v in values.items() if k not in OF_TRAINING}
    if of.after_nu:
        values["importance"] = str(nu_folder(study, "lora-nu-mu", seed))
    return build(RecordSettings, values)


def whole(run: Run) -> Run:
    """The run whose adapter a rewound one scales; itself where nothing is rewound."""
    of = METHODS[run.method]
    return replace(run, method=of.rewinds, phi=of.at) if of.rewinds else run


def mu_folder(study: Study, run: Run) -> Path:
    """Where the adapter of a run is."""
    return Path(study.work) / "mu" / key_of(study, whole(run))


def tune_settings(study: Study, run: Run, nu: Path | None) -> TuneSettings:
    of = METHODS[run.method]
    values: dict[str, Any] = {
        "model": study.model, "importance": nu and str(nu), "seed": run.seed, "resume": True,
        "task": study.where(study.tasks[run.task]["train"]),
        "output": str(mu_folder(study, run)),
        # An adapter that starts at no recorded one has the shape of those that do.
        **({} if nu else {k: v for k, v in study.record.items() if k in ADAPTER}),
        **study.tune, **(of.tune or {}),
    }  # fmt: skip
    for setting in of.keeps.split():
        values[setting] = [study.where(t) for t in study.general.values()]
    if run.phi is not None:
        setting, _, name = of.swept.partition(".")
        values[setting] = {**values.get(setting, {}), name: run.phi} if name else run.phi
    return build(TuneSettings, values)


def eval_settings(study: Study, task: str) -> EvalSettings:
    values = {
        "model": study.model,
        "task": [study.where(t) for t in (study.tasks[task]["test"], *study.others.values())],
        "text": [f"{k}={study.where(v)}" for k, v in study.held_out.items()], **study.eval,
    }  # fmt: skip
    return build(EvalSettings, values)


def digest(what: Any) -> str:
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_types(values: dict[str, Any], path: Path) -> None:
    hints = get_type_hints(Study)
    for key, value in values.items():
        kind = get_origin(hints[key]) or hints[key]
        if kind in (list, dict, str) and not isinstance(value, kind):
            words = {list: "a list", dict: "a mapping of names to values", str: "text"}
            raise InputError(f"{path}: {key} must be {words[kind]}, not {value!r}.")
    if not isinstance(values.get("phi", []), (list, dict)):
        raise InputError(f"{path}: phi must be a list of numbers, or of each method's numbers.")
    if not all(isinstance(s, int) for s in values["seeds"]):
        raise InputError(f"{path}: seeds must be whole numbers.")
    for key in ("methods", "seeds", "tasks", "held_out"):
        if not values[key]:
            raise InputError(f"{path}: {key} is empty.")
    for name, task in values["tasks"].items():
        if not isinstance(task, dict) or set(task) != {"train", "test"}:
            raise InputError(f"{path}: task {name} must name its `train` and its `test`.")


def _chosen(study: Study, path: Path) -> Study:
    """The study with the first text or task of each list that there is."""
    digests: dict[str, str] = {}

    def choose(of: str | list[str]) -> str:
        specs = of if isinstance(of, list) else [of]
        if not specs or not all(isinstance(s, str) for s in specs):
            raise InputError(f"{path}: a text or task must be text, or a list of it, not {of!r}.")
        files = {s: Path(study.where(s)) for s in specs}
        # A file that is missing is passed over if something else may stand for it.
        spec = next((s for s in specs if files[s].exists() or not files[s].suffix), specs[-1])
        if files[spec].is_file():
            digests[spec] = sha256(files[spec])[:16]
        return spec

    def all_of(named: dict[str, Any]) -> dict[str, str]:
        return {k: choose(v) for k, v in named.items()}

    return replace(
        study, general=all_of(study.general), held_out=all_of(study.held_out),
        tasks={k: all_of(v) for k, v in study.tasks.items()}, others=all_of(study.others),
        digests=digests,
    )  # fmt: skip
