"""Questions and answers as rows of tokens, made when they are asked for."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hlora.data.encode import encode, leading, prefix_token
from hlora.data.rows import IGNORED, Lazy, Row, Rows
from hlora.data.tasks import Example, Task, rendered
from hlora.errors import InputError

logger = logging.getLogger(__name__)


def encode_pair(
    tokenizer: Any, prompt: str, completion: str, where: str = "", vocabulary: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it, as lm-evaluation-harness cuts them.

    The two are tokenized together and cut where the prompt alone would end; white space at the end
    of the prompt belongs to what follows.

    Raises:
        InputError: the tokenizer cannot take them, or leaves nothing of the completion.
    """
    bare = prompt.rstrip()
    completion = prompt[len(bare) :] + completion
    if bare:
        whole = encode(tokenizer, bare + completion, where, vocabulary)
        head = encode(tokenizer, bare, where, vocabulary)
        head, tail = whole[: len(head)], whole[len(head) :]
    else:
        tail = encode(tokenizer, completion, where, vocabulary, special=False)
        head = [prefix_token(tokenizer)]
        tail = tail[1:] if tail[:1] == head else tail
    if not tail:
        raise InputError(f"{where}: the tokenizer leaves nothing of the answer {completion!r}.")
    return head, tail


def answer_rows(
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    vocabulary: int | None = None,
    context: int | None = None,
) -> Rows:
    """The right answers of a task as rows, with the loss on the answers only.

    A row is tokenized when it is first read. Prompts that do not fit into `max_length` tokens lose
    their beginning, but for the token that the tokenizer begins a text with.

    Args:
        vocabulary, context: how many tokens the model knows, and takes; None does not check.

    Raises:
        InputError: when a row is read that the tokenizer or the model cannot take.
    """
    begin = leading(tokenizer)
    eos = tokenizer.eos_token_id
    told = False

    def row(index: int) -> Row:
        nonlocal told
        example = rendered(task.examples[index], tokenizer)
        if example.passed_over and not told:
            logger.warning(
                "%s: the chat template rewrites earlier answers as the conversation goes on, so "
                "only the last answer of such rows is learned.", example.where,
            )  # fmt: skip
            told = True
        answer = example.choices[example.answer]
        head, tail = encode_pair(tokenizer, example.prompt, answer, example.where, vocabulary)
        if eos is not None and eos not in tail:
            tail = [*tail, eos]
        tail = tail[:max_length]
        labels = _learned(tokenizer, example, head)
        over = len(head) + len(tail) - max_length
        if over > 0:
            kept = begin if head[:1] == begin and len(tail) < max_length else []
            head = kept + head[over + len(kept) :]
            labels = [IGNORED] * len(kept) + labels[over + len(kept) :]
        if context is not None and len(head) + len(tail) > context:
            raise InputError(
                f"{example.where}: {len(head) + len(tail)} tokens, and the model takes {context}: "
                f"give --max-length {context}."
            )
        return {"input_ids": torch.tensor(head + tail), "labels": torch.tensor(labels + tail)}

    def source() -> list[Any]:
        return [max_length, [(e.prompt, e.choices, e.answer, e.chat) for e in task.examples]]

    return Rows(Lazy(len(task.examples), row), source)


def _learned(tokenizer: Any, example: Example, head: list[int]) -> list[int]:
    """Labels of a prompt's tokens: those of the earlier answers in it."""
    labels = [IGNORED] * len(head)
    for start, end in example.learned:
        a, b = (len(encode(tokenizer, example.prompt[:n], example.where)) for n in (start, end))
        labels[a:b] = head[a:b]
    return labels
