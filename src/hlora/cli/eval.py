"""`hlora eval`: perplexity, accuracy, NLL, and how much was forgotten."""

from __future__ import annotations

import math

from rich.table import Table

from hlora.cli.screen import Screen, say
from hlora.run.evaluate import TaskScore, TextScore, forgetting
from hlora.run.harness import HarnessScore
from hlora.run.scoring import Scores, evaluate
from hlora.run.settings import EvalSettings


def run(settings: EvalSettings) -> None:
    """Print one table of text and one of tasks."""
    _show(evaluate(settings))
    if settings.json:
        say(f"Written to {settings.json}.")


def _show(scores: dict[str, Scores]) -> None:
    console = Screen()
    both = "adapter" in scores
    text: dict[str, TextScore] = scores["base"]["text"]
    if text:
        title = "General text (perplexity = e^loss; forgetting in nats per token)"
        more = ("adapter", "forgetting") if both else ()
        table = _table(title, "kind", "tokens", "base", *more)
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
        title = "Tasks (± one standard error; NLL of the right answer in nats)"
        table = _table(title, "task", "model", "n", "acc %", "acc_norm %", "NLL")
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


def _show_harness(console: Screen, scores: dict[str, Scores]) -> None:
    title = "lm-evaluation-harness (± one standard error)"
    table = _table(title, "task", "model", "n", "measure", "value")
    for name in scores["base"]["lm_eval"]:
        for which, of in scores.items():
            found: HarnessScore = of["lm_eval"][name]
            for measure, (value, error) in found.values.items():
                text = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                table.add_row(name, which, f"{found.n:,}", measure, text)
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        text = heading in ("kind", "task", "model", "measure")
        table.add_column(heading, justify="left" if text else "right")
    return table


def _perplexity(score: TextScore) -> str:
    return f"{score.perplexity:.2f} ± {score.perplexity * score.loss_se:.2f}"


def _percent(value: float, error: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} ± {100 * error:.1f}"
