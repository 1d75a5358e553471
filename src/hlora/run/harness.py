"""lm-evaluation-harness on a model in memory, adapter and all.

Tasks are names of its own zoo (data from the hub), its task files (.yaml, whole: no `include`, no
Python), or whatever `hlora eval --task` reads, whose rows are passed on as prompt, choices, answer.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from hlora.data.tasks import load_task
from hlora.errors import InputError, suggest
from hlora.run.progress import watched

LOCAL = (".jsonl", ".json", ".parquet")
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class HarnessScore:
    """What lm-evaluation-harness found on one task.

    Attributes:
        n: questions.
        values: measure → (value, its standard error or None); `acc`, `exact_match`, ...
    """

    n: int
    values: dict[str, tuple[float, float | None]]


@dataclass(frozen=True)
class HarnessTasks:
    """Checked tasks: what `simple_evaluate` takes, and the manager that knows them."""

    tasks: list[Any]
    manager: Any


@contextlib.contextmanager
def prepared(
    specs: Sequence[str], *, format: str | None = None, limit: int | None = None
) -> Iterator[HarnessTasks]:
    """The tasks, ready to be run; local ones lie in a folder that goes away after.

    Args:
        specs: names of the zoo, .yaml task files, or data files as [NAME=]FILE.
        format: how rows of data files are read, as --task-format.
        limit: at most so many rows of a data file.

    Raises:
        InputError: lm-eval is not installed, no such task, or a task file that it cannot run alone.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("--lm-eval needs lm-eval: pip install 'hlora[eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="hlora-lm-eval-") as folder:
        tasks = [_task(s, Path(folder), format, limit) for s in specs]
        names = [t for t in tasks if isinstance(t, str)]
        manager = TaskManager(include_defaults=bool(names))
        for name in names:
            if name not in manager.all_tasks:
                end = suggest(name, manager.all_tasks, ", and no such file is here.")
                raise InputError(f"lm-eval has no task {name!r}" + end)
        yield HarnessTasks(tasks, manager)


def run(
    model: nn.Module, tokenizer: Any, tasks: HarnessTasks, *, batch_size: int, limit: int | None
) -> dict[str, HarnessScore]:
    """Scores by task. The model's mode is left as it was.

    Raises:
        InputError: the data of a task cannot be reached.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    try:
        with _quiet():
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks.tasks, task_manager=tasks.manager, limit=limit, bootstrap_iters=100,
                log_samples=False,
            )  # fmt: skip
    except (ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"lm-eval cannot run these tasks: {text}") from None
    finally:
        model.train(training)
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


def _task(spec: str, folder: Path, format: str | None, limit: int | None) -> str | dict[str, Any]:
    name, sep, where = spec.partition("=")
    if not sep:
        name, where = "", spec
    if Path(where).suffix in (".yaml", ".yml"):
        return _task_file(Path(where))
    if not sep and Path(where).suffix not in LOCAL:
        return where
    task = load_task(where, split="test", format=format, limit=limit)
    if any(len(e.choices) < 2 for e in task.examples):
        raise InputError(
            f"{where} has rows without choices: lm-eval is given multiple choice only."
        )
    name = name or task.name
    path = folder / f"{name}.jsonl"
    delimiter = task.format.delimiter
    with path.open("w", encoding="utf-8") as file:
        for e in task.examples:
            row = {"prompt": e.prompt, "choices": list(e.bare), "answer": e.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        "task": name, "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "target_delimiter": delimiter, "metric_list": [{"metric": m} for m in METRICS],
    }  # fmt: skip


def _task_file(path: Path) -> dict[str, Any]:
    try:
        task = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"The task file {path} cannot be read ({error.strerror}).") from None
    except yaml.constructor.ConstructorError as error:
        raise InputError(
            f"The task file {path} asks for Python code ({error.problem}), which is not run: use "
            "templates only."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"The task file {path} is not YAML: {said}") from None
    if not isinstance(task, dict):
        raise InputError(f"The task file {path} must map names to values.")
    if "include" in task:
        raise InputError(
            f"The task file {path} includes {task['include']!r}: copy that into it, since a task "
            "file must be whole here."
        )
    missing = [k for k in ("task", "dataset_path", "output_type", "doc_to_text") if k not in task]
    if missing:
        raise InputError(f"The task file {path} lacks {missing[0]!r}.")
    files = task.get("dataset_kwargs", {}).get("data_files")
    if isinstance(files, dict):
        for split, file in files.items():
            here = path.parent / str(file)
            if not here.is_file():
                raise InputError(f"{path} names {file}, and there is no file {here}.")
            files[split] = str(here.resolve())
    return task


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its bars are for a person's eyes."""
    with contextlib.ExitStack() as stack:
        if not watched():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
