"""What the demo runs: one phase ν, and three ways to learn chemistry after it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlora import __version__
from hlora.core.store import MARKER, TENSORS, read_info
from hlora.data.chemistry import write_chemistry
from hlora.data.tasks import Task, load_task
from hlora.data.text import Source, blocks
from hlora.errors import InputError
from hlora.run.build import command_line
from hlora.run.evaluate import pooled_forgetting
from hlora.run.models import load, load_adapter, pick_device, pick_dtype
from hlora.run.phases import TUNED, record, tune
from hlora.run.scoring import Scores, score
from hlora.run.settings import DemoSettings, RecordSettings, TrainSettings, TuneSettings
from hlora.study.demo_general import SEEN, UNSEEN, write_general

BASE, NU, PLAIN, HLORA = "base", "after ν", "LoRA(ν+μ)", "HLoRA"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA(μ)": {"phi": 0.0, "anchor": "base"},
    PLAIN: {"phi": 0.0},
    HLORA: {},
}
"""What distinguishes the three. φ = 0 is plain LoRA, bit for bit; `base` starts from B = 0."""

FOLDERS = {"LoRA(μ)": "lora-mu", PLAIN: "lora-nu-mu", HLORA: "hlora"}


@dataclass(frozen=True)
class Size:
    """How much is trained and scored; a row of text has 128 tokens."""

    nu_steps: int
    mu_steps: int
    text_rows: int
    questions: int


FULL = Size(nu_steps=26, mu_steps=28, text_rows=24, questions=100)
QUICK = Size(nu_steps=2, mu_steps=2, text_rows=2, questions=8)

Say = Callable[[str], None]


def run_story(settings: DemoSettings, say: Say) -> dict[str, Any]:
    """Everything but the page: data, four trainings, scores. Goes on where it was stopped.

    Returns:
        What demo.json holds.
    """
    output, size = Path(settings.output), QUICK if settings.quick else FULL
    data = output / "data"
    say("Data: Python's documentation, docstrings and code; chemistry from mendeleev.")
    write_general(data)
    write_chemistry(data)
    nu = record_settings(settings, size)
    tunes = {m: tune_settings(settings, size, m) for m in METHODS}
    say("Phase ν: learn general text and record what matters for it.")
    _phase(record, nu, MARKER)
    for method, t in tunes.items():
        say(f"Phase μ: learn chemistry with {method}.")
        _phase(tune, t, TUNED)
    say("Scores: three kinds of text, chemistry in words that training did not use.")
    scores, questions = _scores(settings, size, nu)
    return {**_results(settings, nu, tunes, scores), "questions": questions}


def _train_settings(settings: DemoSettings) -> dict[str, Any]:
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    return {
        "model": settings.model, "device": settings.device, "dtype": dtype, "seed": settings.seed,
        "save_steps": 10, "logging_steps": 5, "resume": True,
    }  # fmt: skip


def record_settings(settings: DemoSettings, size: Size) -> RecordSettings:
    output = Path(settings.output)
    return RecordSettings(
        **_train_settings(settings), output=str(output / "nu"),
        text=[str(output / "data" / f"{kind}.train.txt") for kind in SEEN],
        block_size=128, batch_size=8, max_steps=size.nu_steps, kind="dense",  # the paper's
    )  # fmt: skip


def tune_settings(settings: DemoSettings, size: Size, method: str) -> TuneSettings:
    output = Path(settings.output)
    return TuneSettings(
        **_train_settings(settings), output=str(output / FOLDERS[method]),
        importance=str(output / "nu"), task=str(output / "data" / "chemistry.train.jsonl"),
        batch_size=16, max_steps=size.mu_steps, **{"phi": settings.phi, **METHODS[method]},
    )  # fmt: skip


def _phase(run: Callable[[Any], Any], settings: TrainSettings, marker: str) -> None:
    """Run a command, unless its folder holds its result already."""
    done = Path(settings.output) / marker
    if not done.is_file():
        run(settings)
        return
    before = json.loads(done.read_text("utf-8")).get("settings")
    if before != asdict(settings):
        raise InputError(
            f"{settings.output} is of a demo with other settings: choose another --output, or "
            "start anew with --overwrite."
        )
    print(f"{settings.output} is done already.")


def held_out(
    data: Path, tokenizer: Any, block_size: int, size: Size
) -> tuple[dict[str, Tensor], Task]:
    """Blocks of each kind of text, and the chemistry questions, that no training reads."""
    kinds = {
        kind: blocks(
            Source.parse(str(data / f"{kind}.test.txt")), tokenizer, block_size, size.text_rows
        )
        for kind in (*SEEN, UNSEEN)
    }
    return kinds, load_task(str(data / "chemistry.test.jsonl"), limit=size.questions)


def _scores(
    settings: DemoSettings, size: Size, nu: RecordSettings
) -> tuple[dict[str, Scores], list[dict[str, Any]]]:
    """Scores by model, and what each model answered to the first questions."""
    output, device = Path(settings.output), pick_device(settings.device)
    model, tokenizer = load(nu.model, dtype=nu.dtype, device=device)
    kinds, task = held_out(output / "data", tokenizer, nu.block_size, size)
    scores = {BASE: score(model, tokenizer, kinds, [task], 8)}
    for name, folder in {NU: "nu", **FOLDERS}.items():
        adapted = load_adapter(model, output / folder)
        scores[name] = score(adapted, tokenizer, kinds, [task], 8)
        model = adapted.unload()  # type: ignore[operator]
    questions = [
        {
            "prompt": example.prompt,
            "right": example.bare[example.answer],
            "answers": {
                name: example.bare[lls.index(max(lls))]
                for name, of in scores.items()
                for lls in [of["task"][task.name].items[i]]
            },
        }
        for i, example in enumerate(task.examples[:8])
    ]
    return scores, questions


def _results(
    settings: DemoSettings, nu: RecordSettings, tunes: dict[str, TuneSettings],
    scores: dict[str, Scores],
) -> dict[str, Any]:  # fmt: skip
    recorded = read_info(nu.output)
    tuned = {m: json.loads((Path(t.output) / "tune.json").read_text()) for m, t in tunes.items()}
    nu_seconds = recorded["summary"]["seconds"]
    base = scores[BASE]["text"]
    rows = []
    for name, of in scores.items():
        lost = {
            which: asdict(pooled_forgetting([(base[k], of["text"][k]) for k in kinds]))
            for which, kinds in {
                "seen": SEEN,
                "unseen": (UNSEEN,),
                **{k: (k,) for k in base},
            }.items()
        }
        seconds = 0.0
        if name in (NU, PLAIN, HLORA):
            seconds += nu_seconds
        if name in tuned:
            seconds += tuned[name]["seconds"]
        rows.append(
            {
                "method": name,
                "text": {k: s.asdict() for k, s in of["text"].items()},
                "task": next(iter(of["task"].values())).asdict(),
                "forgetting": None if name == BASE else lost,
                "seconds": seconds,
                "importance_bytes": recorded["files"][TENSORS]["bytes"] if name == HLORA else 0,
            }
        )
    return {
        "hlora_version": __version__,
        "settings": asdict(settings),
        "saved": {
            which: asdict(
                pooled_forgetting(
                    [(scores[HLORA]["text"][k], scores[PLAIN]["text"][k]) for k in kinds]
                )
            )
            for which, kinds in (("seen", SEEN), ("unseen", (UNSEEN,)))
        },
        "machine": {
            "processor": platform.machine(), "cores": torch.get_num_threads(),
            "device": pick_device(settings.device), "dtype": nu.dtype,
            "python": platform.python_version(), "torch": torch.__version__,
        },
        "seen": list(SEEN),
        "unseen": UNSEEN,
        "rows": rows,
        "logs": {m: t["log"] for m, t in tuned.items()},
        "norms": recorded["norms"],
        "commands": [
            command_line("record", nu), *(command_line("tune", t) for t in tunes.values()),
        ],
    }  # fmt: skip
