"""lm-evaluation-harness on a model in memory, adapter and all.

Tasks are names of its own zoo (data from the hub) or task files (`hlora.run.taskfile`), whose
templates run in a sandbox. Files of rows are `--task`'s, whose scores a test compares with the
harness's to the digit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hlora.core.evaluating import evaluating
from hlora.data.read import SUFFIXES, suffix_of
from hlora.data.sandbox import Sandbox
from hlora.errors import DivergedError, InputError, is_memory, one_line, optional, suggest
from hlora.files import is_full_disk
from hlora.run.progress import watched
from hlora.run.taskfile import read_task_file


@dataclass(frozen=True)
class HarnessScore:
    """What lm-evaluation-harness found on one task.

    Attributes:
        n: questions.
        values: measure → (value, its standard error or None); `acc`, `exact_match`, ...
    """

    n: int
    values: dict[str, tuple[float, float | None]]


Tasks = tuple[list[Any], Any]
"""Checked tasks: what `simple_evaluate` takes, and the manager that knows them."""


def prepare(specs: Sequence[str]) -> Tasks:
    """The tasks, checked and ready to be run.

    Args:
        specs: names of the zoo, or .yaml task files.

    Raises:
        InputError: lm-eval is not installed, no such task, or a task file that it cannot run alone.
    """
    optional("lm_eval.models.huggingface", "--lm-eval needs", "eval")  # what it lacks, said now
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [_task(s) for s in specs]
    names = [t for t in tasks if isinstance(t, str)]
    called = [t if isinstance(t, str) else t["task"] for t in tasks]
    if twice := [n for n in called if called.count(n) > 1]:
        raise InputError(f"Two tasks of --lm-eval are named {twice[0]!r}: rename one.")
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            end = suggest(name, manager.all_tasks, ", and no such file is here.")
            raise InputError(f"lm-eval has no task {name!r}" + end)
    return tasks, manager


def run(
    model: nn.Module, tokenizer: Any, tasks: Tasks, *, batch_size: int, limit: int | None
) -> dict[str, HarnessScore]:
    """Scores by task. The model's mode is left as it was.

    Raises:
        InputError: the data of a task cannot be reached.
        DivergedError: a likelihood is not a number.
    """
    found: dict[str, HarnessScore] = {}
    checked, manager = tasks
    with evaluating(model):
        for some in ([t for t in checked if kind is type(t)] for kind in (dict, str)):
            if some:
                found |= _scores(model, tokenizer, some, manager, batch_size, limit)
    return found


def _scores(
    model: nn.Module, tokenizer: Any, tasks: list[Any], manager: Any, batch_size: int,
    limit: int | None,
) -> dict[str, HarnessScore]:  # fmt: skip
    from lm_eval import simple_evaluate, utils
    from lm_eval.models.huggingface import HFLM

    class Finite(HFLM):
        """The harness would take NaN for the highest likelihood."""

        def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            found = super()._loglikelihood_tokens(*args, **kwargs)
            if any(math.isnan(ll) for ll, _ in found):
                raise DivergedError(
                    "The model's likelihoods are not finite (NaN), so lm-eval cannot compare them: "
                    "try --dtype fp32, or another adapter."
                )
            return found

    before = utils.env
    if isinstance(tasks[0], dict):
        utils.env = Sandbox()
    try:
        # Its bars are for a person's eyes.
        with contextlib.nullcontext() if watched() else contextlib.redirect_stderr(io.StringIO()):
            found = simple_evaluate(
                model=Finite(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=100,
                log_samples=False,
            )  # fmt: skip
    except DivergedError:
        raise
    except Exception as error:  # by a task, lm-eval may raise anything
        if is_full_disk(error) or is_memory(error):
            raise
        text = one_line(error) or type(error).__name__
        raise InputError(f"lm-eval cannot run these tasks: {text}") from None
    finally:
        utils.env = before
    return {
        name: HarnessScore(int(found["n-samples"][name]["effective"]), _values(of))
        for name, of in found["results"].items()
        if name in found["n-samples"]  # a group has no samples of its own
    }


def _values(of: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    values = {}
    for key, value in of.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = of.get(f"{name}_stderr,{filtered}")
        values[name] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    return values


def _task(spec: str) -> str | dict[str, Any]:
    path = Path(spec)
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_task_file(path)
    if suffix_of(path) not in SUFFIXES:
        return spec
    raise InputError(f"{spec} is a file of rows: score it with --task instead.")
