"""The built-in study on a small model, `demo.yaml`, and the page of its one seed."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from hlora.data.tasks import Example, load_task
from hlora.errors import InputError
from hlora.files import size
from hlora.run.build import command_line
from hlora.run.evaluate import TextScore, pooled_forgetting
from hlora.run.settings import DemoSettings
from hlora.study import figures, spec
from hlora.study.cells import Table
from hlora.study.claims import mean_norms
from hlora.study.lines import Line
from hlora.study.methods import METHODS
from hlora.study.metrics import perplexity
from hlora.study.page import Part, write
from hlora.study.rows import Results
from hlora.study.spec import Study

TITLE = "LoRA that does not forget"
PLAIN, OURS = "lora-mu", "held"
QUICK: dict[str, dict[str, Any]] = {
    "record": {"max_steps": 2, "sequences": 8}, "tune": {"max_steps": 2},
    "eval": {"text_blocks": 2, "task_rows": 8},
}  # fmt: skip
"""Sizes that only show that it runs."""
ASKED = 8
"""Questions that the page shows."""


def demo_study(settings: DemoSettings) -> Study:
    """`demo.yaml` for a model, seed, φ and output folder."""
    with as_file(files("hlora.study").joinpath("demo.yaml")) as path:
        study = spec.read_study(path)
    common = {"device": settings.device, "dtype": settings.dtype}
    changed: dict[str, Any] = {
        name: {**getattr(study, name), **common, **(quick if settings.quick else {})}
        for name, quick in QUICK.items()
    }
    work = str(Path(settings.output) / "work")
    assert isinstance(study.phi, dict)
    phi = {**study.phi, OURS: [settings.phi]}
    return replace(
        study, model=settings.model, seeds=[settings.seed], phi=phi, work=work, **changed
    )


def refuse_another(study: Study, results: Results) -> None:
    """Raise InputError where the results are of a demo with other settings."""
    runs = [asdict(r) for r in spec.runs_of(study)]
    for line in [*results.lines, *results.failed]:
        if line["study"] != study.settings() or line["run"] not in runs:
            raise InputError(
                "The output is of a demo with other settings: choose another --output, or start "
                "over with --overwrite."
            )


def summary(results: Results) -> Table:
    """One row a model: the domain, the general text, the cost, each with its own error."""
    kinds, unseen = list(results.lines[0]["text"]), results.lines[0]["unseen"]
    headings = [
        "model", "accuracy %", "NLL", *(f"PPL {k}" + ("*" if k in unseen else "") for k in kinds),
        "forgot, seen", "forgot, unseen*", "seconds", "importance",
    ]  # fmt: skip
    return Table(
        headings, [_cells(line, kinds) for line in results.lines], strong=METHODS[OURS].label
    )


def _cells(line: Line, kinds: list[str]) -> list[str]:
    task = line["task"]
    seconds = sum(s or 0.0 for s in line.get("seconds", {}).values())
    forgot = ["{nats:+.3f} ± {se:.3f}".format(**line["forgetting"][w]) for w in ("seen", "unseen")]
    return [
        line["label"],
        f"{100 * task['acc']:.1f} ± {100 * task['acc_se']:.1f}",
        f"{task['nll']:.2f} ± {task['nll_se']:.2f}",
        *(f"{perplexity(line, [k]):.2f}" for k in kinds),
        *(["0", "0"] if line["run"]["method"] == "base" else forgot),
        f"{seconds:.0f}" if seconds else "–",
        size(line["importance_bytes"]) if "importance_bytes" in line else "–",
    ]


def note(results: Results) -> str:
    """What the table's columns mean, and how much stands behind them."""
    line = results.lines[0]
    [unseen] = line["unseen"]
    return (
        f"One seed ({line['run']['seed']}). Accuracy and NLL (nats, of the right answer) over "
        f"{line['task']['n']} chemistry questions in words that training did not use. Perplexity "
        f"over {line['text'][unseen]['tokens']:,} tokens of each kind. Forgot: loss on general "
        "text minus the base model's, nats per token; below zero, the text was learned. ± is one "
        f"standard error. * {unseen} is in no text that was read: what is lost there is general "
        "ability. Seconds: training, and the general phase or the gathering where there is one."
    )


def verdict(results: Results) -> str:
    """What this run found, whichever way it went."""
    ours, plain = (next(r for r in results.lines if r["run"]["method"] == m) for m in (OURS, PLAIN))
    parts = []
    [unseen] = ours["unseen"]
    kinds = {"seen": [k for k in ours["text"] if k != unseen], "unseen": [unseen]}
    for which, text in (("seen", "text like that of the gathering"), ("unseen", unseen)):
        pairs = [[TextScore(**of["text"][k]) for of in (ours, plain)] for k in kinds[which]]
        saved = pooled_forgetting([(a, b) for a, b in pairs])
        if abs(saved.nats) < 2 * saved.se or not saved.nats:
            parts.append(f"as much as plain LoRA on {text}, within the noise")
        else:
            word = "less" if saved.nats > 0 else "MORE"
            amount = f"{abs(saved.nats):.3f} ± {saved.se:.3f}"
            parts.append(f"{amount} nats per token {word} on {text}")
    a, b = ours["task"], plain["task"]
    return (
        f"Held at the base, the model forgot {', and '.join(parts)}, compared with the same "
        f"training without a penalty. Accuracy on chemistry: {100 * a['acc']:.1f} % and "
        f"{100 * b['acc']:.1f} %, ± {100 * a['acc_se']:.1f}; NLL of the right answer: "
        f"{a['nll']:.2f} and {b['nll']:.2f}."
    )


def commands(study: Study) -> list[str]:
    """What the demo ran, as commands to copy."""
    found = []
    for run in spec.runs_of(study):
        of, nu = METHODS[run.method], None
        if of.record is not None:
            nu = spec.nu_folder(study, run.method, run.seed)
            found.append(command_line("record", spec.record_settings(study, run.method, run.seed)))
        if of.tune is not None and not of.rewinds:
            found.append(command_line("tune", spec.tune_settings(study, run, nu)))
    return found


def _questions(results: Results, examples: list[Example]) -> Table:
    """The first questions, with each model's answer."""
    rows = []
    for i, e in enumerate(examples[:ASKED]):
        given = [r["answers"][i] for r in results.lines]
        marked = ["–" if a is None else e.bare[a] + " ✓" * (a == e.answer) for a in given]
        rows.append([e.prompt, e.bare[e.answer], *marked])
    return Table(["question", "right", *(r["label"] for r in results.lines)], rows)


def write_page(path: Path, study: Study, results: Results) -> list[Path]:
    """The self-contained page of the demo, its figures beside it."""
    ours = next(r for r in results.rows if r.method == OURS)
    line = results.of(ours)[0]
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items() if v)
    machine = line["machine"]
    asked = load_task(study.tasks["chemistry"]["test"], limit=ASKED).examples
    return write(
        [
            Part("Results", note(results), summary(results), [
                ("forgetting", figures.forgetting_bars(results, ours),
                 "Change of the loss on each kind of text against the base model, ± one standard "
                 "error. Right of zero is forgotten."),
            ]),
            Part("Training", figures=[
                ("task", figures.task_losses(results),
                 "The task's loss. All take the same steps on the same rows."),
                ("losses", figures.losses(results, ours),
                 "The held model's loss and penalty (φR; as the paper's Fig. 4): it is zero at the "
                 "base model and rises as the task pulls the weights away."),
            ]),
            Part("What is held",
                 "The size of the importance of each target matrix: bright ones are held most.",
                 figures=[
                ("norms", figures.heatmap(mean_norms(results, ours)),
                 "The size of the importance (‖Ω‖₂) by block and matrix, on a log scale (the "
                 "paper's Fig. 7)."),
            ]),
            Part("Some questions of the test",
                 "The answer with the highest likelihood of four; ✓ is right.",
                 _questions(results, asked)),
            Part("How this was made",
                 f"{versions}; {machine['threads']} threads on {machine['device']}. The demo ran "
                 "these commands; the rewound adapter is the plain one, scaled.",
                 code="\n".join(commands(study))),
        ],
        path, title=TITLE, lead=verdict(results),
    )  # fmt: skip
