"""`hlora eval`: perplexity, accuracy, NLL, and how much was forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hlora.cli.screen import say
from hlora.cli.show import show
from hlora.core.card import give_or_take
from hlora.run.evaluate import TextScore, forgetting
from hlora.run.scoring import Scores, evaluate
from hlora.run.settings import EvalSettings

WORDS = ("model", "measure")


def run(settings: EvalSettings) -> None:
    """Print one table of text and one of tasks."""
    _show(evaluate(settings))
    if settings.json:
        say(f"Written to {settings.json}.")


def _show(scores: dict[str, Scores]) -> None:
    base, after = scores["base"], scores.get("adapter")
    headings = ["kind", "tokens", "base", *(("adapter", "forgetting", "KL") if after else ())]
    rows = []
    for name, before in base["text"].items():
        rows.append([name, f"{before.tokens:,}", _perplexity(before)])
        if after:
            score = after["text"][name]
            lost, apart = forgetting(before, score), score.divergence
            rows[-1] += [_perplexity(score), give_or_take(lost.nats, lost.se, "+.4f .4f")]
            rows[-1].append(give_or_take(apart.nats, apart.se, ".4f .4f"))
    show(
        "General text (perplexity = e^loss; forgetting: rise of the loss, nats per token; KL: how "
        "far the predictions are from the base model's)", headings, rows,
    )  # fmt: skip
    rows = []
    for name, which, s in _each(scores, "task"):
        percents = [_percent(s.acc, s.acc_se), _percent(s.acc_norm, s.acc_norm_se)]
        nll = give_or_take(s.nll, s.nll_se, ".3f .3f")
        rows.append([name, which, f"{s.n:,}", *percents, nll])
    headings = ["task", "model", "n", "acc %", "acc_norm %", "NLL"]
    show(
        "Tasks (± one standard error; NLL of the right answer in nats)", headings, rows, words=WORDS
    )
    rows = []
    for name, which, found in _each(scores, "lm_eval"):
        for measure, (value, error) in found.values.items():
            text = give_or_take(value, error, ".4f .4f")
            rows.append([name, which, f"{found.n:,}", measure, text])
    headings = ["task", "model", "n", "measure", "value"]
    show("lm-evaluation-harness (± one standard error)", headings, rows, words=WORDS)


def _each(scores: dict[str, Scores], of: str) -> Iterator[tuple[str, str, Any]]:
    """Each task's name, the model's, and the score, task by task."""
    for name in scores["base"].get(of, {}):
        for which, found in scores.items():
            yield name, which, found[of][name]


def _perplexity(score: TextScore) -> str:
    return give_or_take(score.perplexity, score.perplexity * score.loss_se, ".2f .2f")


def _percent(value: float, error: float) -> str:
    return "-" if math.isnan(value) else give_or_take(100 * value, 100 * error, ".1f .1f")
