"""`hlora eval`: perplexity, accuracy, NLL, and how much was forgotten."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hlora.data.tasks import Task, load_task
from hlora.data.text import Source, blocks
from hlora.errors import InputError
from hlora.files import write_json
from hlora.run import harness
from hlora.run.evaluate import TaskScore, TextScore, forgetting, score_task, score_text
from hlora.run.harness import HarnessScore
from hlora.run.models import load, load_adapter, pick_device, pick_dtype
from hlora.run.progress import bar, quiet_libraries
from hlora.run.settings import EvalSettings


def run(settings: EvalSettings) -> None:
    """Print one table of text and one of tasks; with --json write all figures."""
    quiet_libraries()
    if not (settings.text or settings.task or settings.lm_eval):
        raise InputError("Nothing to evaluate: give --text, --task or --lm-eval.")
    if settings.json and Path(settings.json).exists() and not settings.overwrite:
        raise InputError(f"{settings.json} exists already: choose another, or --overwrite it.")
    zoo = [t for spec in settings.lm_eval for t in spec.split(",") if t]
    limit = settings.task_rows or None
    with contextlib.ExitStack() as stack:
        # Before the model: a misspelt task is told at once.
        harnessed = (
            stack.enter_context(harness.prepared(zoo, format=settings.task_format, limit=limit))
            if zoo
            else None
        )
        model, tokenizer, kinds, tasks = prepare(settings)

        def all_scores(of: nn.Module) -> Scores:
            scores = score(of, tokenizer, kinds, tasks, settings.batch_size)
            if harnessed:
                scores["lm_eval"] = harness.run(
                    of, tokenizer, harnessed, batch_size=settings.batch_size, limit=limit
                )
            return scores

        scores = {"base": all_scores(model)}
        if settings.adapter:
            scores["adapter"] = all_scores(load_adapter(model, settings.adapter))
    _show(scores)
    if settings.json:
        write_json(Path(settings.json), _as_json(settings, scores))
        print(f"Written to {settings.json}.")


def prepare(
    settings: EvalSettings,
) -> tuple[nn.Module, Any, dict[str, Tensor], list[Task]]:
    """The base model, its tokenizer, blocks by kind of text, and tasks."""
    sources = [Source.parse(spec, settings.text_column) for spec in settings.text]
    tasks = [
        load_task(t, split="test", format=settings.task_format, limit=settings.task_rows or None)
        for t in settings.task
    ]
    device = pick_device(settings.device)
    model, tokenizer = load(settings.model, dtype=pick_dtype(settings.dtype, device), device=device)
    kinds = {
        s.name: blocks(s, tokenizer, settings.block_size, settings.text_blocks or None)
        for s in sources
    }
    return model, tokenizer, kinds, tasks


Scores = dict[str, dict[str, Any]]


def score(
    model: nn.Module, tokenizer: Any, kinds: dict[str, Tensor], tasks: list[Task], batch_size: int
) -> Scores:
    """Scores by kind of text under `text`, by task under `task`."""
    result: Scores = {"text": {}, "task": {}}
    for name, rows in kinds.items():
        with bar(name, len(rows)) as shown:
            result["text"][name] = score_text(model, rows, batch_size=batch_size, tick=shown.update)
    for task in tasks:
        with bar(task.name, sum(len(e.choices) for e in task.examples)) as shown:
            result["task"][task.name] = score_task(
                model, tokenizer, task, batch_size=batch_size, tick=shown.update
            )
    return result


def _show(scores: dict[str, Scores]) -> None:
    console = Console()
    both = "adapter" in scores
    text: dict[str, TextScore] = scores["base"]["text"]
    if text:
        table = Table(title="General text (perplexity = e^loss; forgetting in nats per token)")
        table.add_column("kind")
        for heading in ("tokens", "base", *(("adapter", "forgetting") if both else ())):
            table.add_column(heading, justify="right")
        for name, base in text.items():
            row = [name, f"{base.tokens:,}", _perplexity(base)]
            if both:
                after = scores["adapter"]["text"][name]
                lost = forgetting(base, after)
                row += [_perplexity(after), f"{lost.nats:+.4f} ± {lost.se:.4f}"]
            table.add_row(*row)
        console.print(table)
    tasks: dict[str, TaskScore] = scores["base"]["task"]
    if tasks:
        table = Table(title="Tasks (± one standard error; NLL of the right answer in nats)")
        table.add_column("task")
        table.add_column("model")
        for heading in ("n", "acc %", "acc_norm %", "NLL"):
            table.add_column(heading, justify="right")
        for name in tasks:
            for which, of in scores.items():
                s: TaskScore = of["task"][name]
                table.add_row(
                    name, which, f"{s.n:,}", _percent(s.acc, s.acc_se),
                    _percent(s.acc_norm, s.acc_norm_se), f"{s.nll:.3f} ± {s.nll_se:.3f}",
                )  # fmt: skip
        console.print(table)
    if "lm_eval" in scores["base"]:
        _show_harness(console, scores)


def _show_harness(console: Console, scores: dict[str, Scores]) -> None:
    table = Table(title="lm-evaluation-harness (± one standard error)")
    for heading in ("task", "model", "n", "measure", "value"):
        table.add_column(heading, justify="right" if heading in ("n", "value") else "left")
    for name in scores["base"]["lm_eval"]:
        for which, of in scores.items():
            found: HarnessScore = of["lm_eval"][name]
            for measure, (value, error) in found.values.items():
                text = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                table.add_row(name, which, f"{found.n:,}", measure, text)
    console.print(table)


def _perplexity(score: TextScore) -> str:
    return f"{score.perplexity:.2f} ± {score.perplexity * score.loss_se:.2f}"


def _percent(value: float, error: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} ± {100 * error:.1f}"


def _as_json(settings: EvalSettings, scores: dict[str, Scores]) -> dict[str, Any]:
    result: dict[str, Any] = {"settings": asdict(settings)}
    for which, of in scores.items():
        result[which] = {
            group: {name: _plain(s) for name, s in named.items()} for group, named in of.items()
        }
    if "adapter" in scores:
        result["forgetting"] = {
            name: asdict(forgetting(before, scores["adapter"]["text"][name]))
            for name, before in scores["base"]["text"].items()
        }
    return _without_nan(result)


def _plain(score: TextScore | TaskScore | HarnessScore) -> dict[str, Any]:
    return asdict(score) if isinstance(score, HarnessScore) else score.asdict()


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
