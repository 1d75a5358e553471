"""Domains learned one after another: what is left of each earlier one after each new one.

    python studies/domains.py studies/domains.yaml [--page FILE.md]

For each method and seed the domains are trained in the file's order, each from where the last one
ended; after each one it and all before it are scored. What is done is kept under `work`, and an
interrupted study goes on. With a_ij of domain j after domain i, of T (Lopez-Paz & Ranzato 2017,
arXiv 1706.08840):

- average accuracy: the mean of a_Tj over all j;
- backward transfer: the mean of a_Tj − a_jj over j < T. Below zero, earlier domains were forgotten.

The same is taken of the negative log-likelihood of the right answer, where above zero is forgotten.
± is a standard error over the questions, each averaged over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlora.data.parse import read_yaml
from hlora.errors import InputError, refuse_unknown
from hlora.files import write_json
from hlora.run.build import build
from hlora.run.evaluate import best
from hlora.run.means import mean_se
from hlora.run.models import load_adapter
from hlora.run.phases import record, tune
from hlora.run.scoring import prepare, score
from hlora.run.settings import EvalSettings, RecordSettings, TuneSettings
from hlora.study.tables import Table

Figures = list[list[dict[str, list[float]]]]
"""[i][j]: `right` (0 or 1) and `nll` of each question of domain j after domain i ≥ j."""


@dataclass(frozen=True)
class Plan:
    """The file: a model, domains by name in their order, methods, and settings of the commands.

    Attributes:
        domains: name → `train` and `test`, as for `hlora tune` and `hlora eval`.
        methods: name → `base`, φ of the importance at the base model, and `domains`, φ of every
            earlier domain's; what is left out does not hold.
        text: general text for the loss that was forgotten, as for `hlora eval`.
    """

    model: str
    domains: dict[str, dict[str, str]]
    methods: dict[str, dict[str, Any]]
    work: str
    seeds: list[int] = field(default_factory=lambda: [0])
    text: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises InputError for an unknown or missing part."""
        values = read_yaml(path, "study")
        refuse_unknown(values, cls.__dataclass_fields__, f"{path}: unknown part")
        if missing := {"model", "domains", "methods", "work"} - values.keys():
            raise InputError(f"{path} lacks {', '.join(sorted(missing))}.")
        for name, of in values["domains"].items():
            if set(of) != {"train", "test"}:
                raise InputError(f"{path}: domain {name} must name its `train` and its `test`.")
        for name, of in values["methods"].items():
            refuse_unknown(of, ("base", "domains"), f"{path}: method {name} has an unknown part")
        values["seeds"] = [int(s) for s in values.get("seeds", [0])]
        return cls(**values)


def scores(plan: Plan, upto: int, adapter: Path | None) -> dict[str, Any]:
    """Of each domain up to one, and of general text: values of each question and block."""
    of = list(plan.domains.values())[: upto + 1]
    values = {"task": [d["test"] for d in of], "text": plan.text, "batch_size": 8, **plan.eval}
    settings = build(EvalSettings, {"model": plan.model, **values})
    model, tokenizer, kinds, tasks = prepare(settings)
    if adapter is not None:
        model = load_adapter(model, adapter)
    found = score(model, tokenizer, kinds, tasks, settings.batch_size)
    right = [[e.answer for e in t.examples] for t in tasks]
    return {
        "domains": [
            {
                "right": [float(best(x) == a) for x, a in zip(s.items, answers, strict=True)]
                if all(len(x) > 1 for x in s.items)
                else [],
                "nll": [-x[a] for x, a in zip(s.items, answers, strict=True)],
            }
            for s, answers in zip(found["task"].values(), right, strict=True)
        ],
        "text": {name: s.blocks for name, s in found["text"].items()},
    }


def kept(path: Path, make: Any) -> Any:
    """The JSON of a file, made if it is not there yet."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text("utf-8"))


def chain(plan: Plan, method: str, seed: int) -> list[dict[str, Any]]:
    """Train the domains one after another; the scores after each."""
    work, phis = Path(plan.work), plan.methods[method]
    base, common = work / f"base-{seed}", {"model": plan.model, "seed": seed, "resume": True}
    held: list[tuple[str, Any]] = []
    if "base" in phis:
        record(build(RecordSettings, {**common, "output": str(base), **plan.record}))
        held.append((str(base), phis["base"]))
    found = []
    for i, (name, of) in enumerate(plan.domains.items()):
        folder = work / f"{method}-{seed}"
        adapter, importance = folder / name, folder / f"{name}-importance"
        last = i == len(plan.domains) - 1
        values = {
            **common, "task": of["train"], "output": str(adapter),
            "importance": [where for where, _ in held], "phi": [phi for _, phi in held],
            "record": None if last else str(importance), **plan.tune,
        }  # fmt: skip
        path = folder / f"{name}.json"
        if not path.exists():
            print(f"== {method}, seed {seed}: {name}", flush=True)
            tune(build(TuneSettings, values))
        found.append(kept(path, lambda i=i, adapter=adapter: scores(plan, i, adapter)))
        held.append((str(importance), phis.get("domains", 0.0)))
    return found


# ---------------------------------------------------------------- figures


def averaged(runs: list[Figures]) -> Figures:
    """Each question's mean over the seeds."""
    return [
        [
            {
                k: [sum(v) / len(v) for v in zip(*(r[i][j][k] for r in runs), strict=True)]
                for k in of
            }
            for j, of in enumerate(row)
        ]
        for i, row in enumerate(runs[0])
    ]


def pooled(parts: list[list[float]]) -> tuple[float, float]:
    """The mean of the parts' means, with its standard error."""
    means, errors = zip(*map(mean_se, parts), strict=True)
    return sum(means) / len(means), math.hypot(*errors) / len(errors)


def average(figures: Figures, what: str) -> tuple[float, float]:
    """The mean of a_Tj over all domains."""
    return pooled([of[what] for of in figures[-1]])


def backward_transfer(figures: Figures, what: str) -> tuple[float, float]:
    """The mean of a_Tj − a_jj over all domains but the last, the same questions paired.

    NaN for a single domain.
    """
    pairs = [(figures[-1][j][what], figures[j][j][what]) for j in range(len(figures) - 1)]
    changes = [[after - at for after, at in zip(*both, strict=True)] for both in pairs]
    return pooled(changes) if changes else (math.nan, math.nan)


def forgotten(base: dict[str, list[float]], after: dict[str, list[float]]) -> tuple[float, float]:
    """Loss on general text minus the base model's, nats per token, over blocks."""
    return mean_se(
        a - b for kind, blocks in base.items() for b, a in zip(blocks, after[kind], strict=True)
    )


def said(of: tuple[float, float], form: str, times: float = 1.0) -> str:
    value, error = (times * v for v in of)
    return "–" if math.isnan(value) else f"{value:{form}} ± {error:{form.lstrip('+')}}"


def page(plan: Plan, base: dict[str, Any], runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """The tables as Markdown: a row a method, then each method domain by domain."""
    names, order = list(plan.domains), " → ".join(plan.domains)
    measured = {m: averaged([[s["domains"] for s in of] for of in r]) for m, r in runs.items()}
    whats = [("nll", "NLL", ".3f", 1.0)]
    if all(of["right"] for of in base["domains"]):
        whats.insert(0, ("right", "accuracy %", ".1f", 100.0))
    headings, rows = ["method"], [[m] for m in measured]
    for what, word, form, times in whats:
        headings += [f"average {word}", f"backward transfer, {word}"]
        for row, of in zip(rows, measured.values(), strict=True):
            row.append(said(average(of, what), form, times))
            row.append(said(backward_transfer(of, what), f"+{form}", times))
    if plan.text:
        headings.append("general text, nats per token")
        for row, r in zip(rows, runs.values(), strict=True):
            last = [forgotten(base["text"], of[-1]["text"]) for of in r]
            means = [v for v, _ in last]
            row.append(said((sum(means) / len(means), last[0][1]), "+.3f"))
    lines = [f"{order}, {len(plan.seeds)} seed(s).", "", *Table(headings, rows).markdown()]
    for what, word, form, times in whats:
        lines += ["", f"{word[0].upper()}{word[1:]} of each domain after each:", ""]
        rows = [["base model", *(said(mean_se(d[what]), form, times) for d in base["domains"])]]
        rows += [
            [f"{m}, after {names[i]}", *(said(mean_se(d[what]), form, times) for d in row),
             *["–"] * (len(names) - len(row))]
            for m, of in measured.items()
            for i, row in enumerate(of)
        ]  # fmt: skip
        lines += Table(["", *names], rows).markdown()
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(argv)
    plan = Plan.read(args.file)
    last = len(plan.domains) - 1
    base = kept(Path(plan.work) / "base.json", lambda: scores(plan, last, None))
    runs = {m: [chain(plan, m, seed) for seed in plan.seeds] for m in plan.methods}
    text = page(plan, base, runs)
    print(text)
    if args.page:
        args.page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
