"""How good is it, and how much did it forget.

Perplexity is e to the mean loss in nats over all tokens; accuracies are those of
lm-evaluation-harness: the choice with the highest log-likelihood, as it is (acc) or over its
length in characters (acc_norm). Every figure comes with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.data.answers import encode_pair
from hlora.data.tasks import Task, batches
from hlora.hf.divergence import by_row
from hlora.hf.limits import context, vocabulary
from hlora.hf.peft import without_adapter
from hlora.run.means import exp, mean_se

Tick = Callable[[int], None]
"""Called with the number of rows just done."""


@dataclass(frozen=True)
class TextScore:
    """Loss on one kind of text.

    Attributes:
        loss: mean over tokens, nats.
        loss_se: standard error of it, over blocks.
        perplexity: e to the loss.
        tokens: how many were predicted.
        blocks: the loss of each block, nats per token.
        divergences: KL(base ‖ adapter) of each block, nats per token; empty where not asked for.
    """

    loss: float
    loss_se: float
    perplexity: float
    tokens: int
    blocks: list[float]
    divergences: list[float] = field(default_factory=list)

    @property
    def divergence(self) -> Forgetting | None:
        """The mean over blocks."""
        return Forgetting(*mean_se(self.divergences)) if self.divergences else None


@dataclass(frozen=True)
class TaskScore:
    """Scores on one task.

    Attributes:
        acc, acc_norm: share of right answers; NaN for rows with a single choice. Scores that
            are no finite numbers make a question wrong.
        nll: negative log-likelihood of the right answer, nats per answer.
        n: number of questions.
        items: by question, the log-likelihood of each choice.
    """

    acc: float
    acc_se: float
    acc_norm: float
    acc_norm_se: float
    nll: float
    nll_se: float
    n: int
    items: list[list[float]]


@dataclass(frozen=True)
class Forgetting:
    """What happened to general text, nats per token.

    The loss after minus before, where negative means that it was learned; or a divergence.

    Attributes:
        nats: the mean over all tokens.
        se: its standard error, over the differences block by block.
    """

    nats: float
    se: float


def figures_of(score: Any) -> dict[str, Any]:
    """A score as plain values, without those of each block or question."""
    of_each = ("blocks", "divergences", "items")
    return {k: v for k, v in asdict(score).items() if k not in of_each}


def forgetting(before: TextScore, after: TextScore) -> Forgetting:
    """How much was forgotten between two scores of the same blocks.

    Raises:
        ValueError: the two scores are of different blocks.
    """
    return pooled_forgetting([(before, after)])


def pooled_forgetting(pairs: Iterable[tuple[TextScore, TextScore]]) -> Forgetting:
    """The same over several kinds of text, each (before, after), every block counting once."""
    both = (pair for of in pairs for pair in zip(of[0].blocks, of[1].blocks, strict=True))
    return Forgetting(*mean_se(after - before for before, after in both))


@torch.no_grad()
def score_text(
    model: nn.Module, blocks: Tensor, *, batch_size: int = 8, tick: Tick | None = None,
    divergence: bool = False, before: Iterator[Tensor] | None = None,
) -> TextScore:  # fmt: skip
    """Loss on blocks of tokens (N, T): each token but a block's first is predicted.

    Args:
        divergence: also compare the predictions of a PEFT model with its base model's.
        before: the base model's logits, batch by batch, where they are there already.
    """
    sums: list[float] = []
    found: list[float] = []
    with evaluating(model):
        device = next(model.parameters()).device
        for part in batches(len(blocks), batch_size):
            ids = blocks[part].to(device)
            logits = model(input_ids=ids[:, :-1]).logits
            for row, target in zip(logits, ids[:, 1:], strict=True):
                sums.append(float(F.cross_entropy(row.float(), target, reduction="sum")))
            if divergence:
                if before is not None:
                    of_base = next(before)
                else:
                    with without_adapter(model):
                        of_base = model(input_ids=ids[:, :-1]).logits
                found += by_row(of_base, logits).tolist()
            if tick:
                tick(part.stop - part.start)
    per_block = blocks.shape[1] - 1
    means = [total / per_block for total in sums]
    loss, error = mean_se(means)
    return TextScore(loss, error, exp(loss), per_block * len(blocks), means, found)


def divergence(
    model: nn.Module, blocks: Tensor, *, batch_size: int = 8, tick: Tick | None = None
) -> Forgetting:
    """KL(base ‖ adapter) on blocks of tokens (N, T), nats per token, with its error over blocks.

    It is what an adapter changed of the predictions, for better or worse: 0 for the base model.
    """
    score = score_text(model, blocks, batch_size=batch_size, tick=tick, divergence=True)
    assert score.divergence is not None
    return score.divergence


@torch.no_grad()
def score_task(
    model: nn.Module, tokenizer: Any, task: Task, *, batch_size: int = 8, tick: Tick | None = None
) -> TaskScore:
    """Log-likelihood of every choice after its prompt, and what follows from it."""
    limit, known = context(model), vocabulary(model)
    task = task.rendered(tokenizer)
    # By what the model reads, which is all but a choice's last token: choices of one token share
    # one pass.
    queue: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = {}
    for q, example in enumerate(task.examples):
        for c, choice in enumerate(example.choices):
            head, tail = encode_pair(tokenizer, example.prompt, choice, example.where, known)
            read = tuple((head + tail)[:-1][-limit:])
            queue.setdefault(read, []).append((q, c, tail[-limit:]))
    inputs = sorted(queue, key=len, reverse=True)
    items = [[0.0] * len(e.choices) for e in task.examples]
    pad = tokenizer.pad_token_id or 0
    with evaluating(model):
        device = next(model.parameters()).device
        for part in batches(len(inputs), batch_size):
            rows = inputs[part]
            width = len(rows[0])
            ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
            mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
            logits = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
            for row, scores in zip(rows, logits, strict=True):
                for q, c, tail in queue[row]:
                    of_tail = scores[len(row) - len(tail) : len(row)].float()
                    target = torch.tensor(tail, device=device)
                    items[q][c] = -float(F.cross_entropy(of_tail, target, reduction="sum"))
            if tick:
                tick(sum(len(queue[row]) for row in rows))
    return summarize(task, items)


def summarize(task: Task, items: list[list[float]]) -> TaskScore:
    """Accuracies and NLL from the log-likelihood of each choice."""
    right, right_norm, nll = [], [], []
    for example, lls in zip(task.examples, items, strict=True):
        nll.append(-lls[example.answer])
        if len(lls) > 1:
            normed = [ll / max(len(c), 1) for ll, c in zip(lls, example.bare, strict=True)]
            right.append(float(best(lls) == example.answer))
            right_norm.append(float(best(normed) == example.answer))
    scores = (*mean_se(right), *mean_se(right_norm), *mean_se(nll))
    return TaskScore(*scores, n=len(items), items=items)


def best(lls: list[float]) -> int | None:
    """The choice with the highest log-likelihood; None where they are not all numbers."""
    return lls.index(max(lls)) if all(map(math.isfinite, lls)) else None
