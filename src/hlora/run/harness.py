"""lm-evaluation-harness on a model in memory, adapter and all.

Tasks are names of its own zoo (data from the hub) or its task files (.yaml, whole: no `include`, no
Python). Files of rows are `--task`'s, whose scores a test compares with the harness's to the digit.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from hlora.data.read import SUFFIXES
from hlora.errors import InputError, suggest
from hlora.run.progress import watched


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


def prepare(specs: Sequence[str]) -> HarnessTasks:
    """The tasks, checked and ready to be run.

    Args:
        specs: names of the zoo, or .yaml task files.

    Raises:
        InputError: lm-eval is not installed, no such task, or a task file that it cannot run alone.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("--lm-eval needs lm-eval: pip install 'hlora[eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [_task(s) for s in specs]
    names = [t for t in tasks if isinstance(t, str)]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            end = suggest(name, manager.all_tasks, ", and no such file is here.")
            raise InputError(f"lm-eval has no task {name!r}" + end)
    return HarnessTasks(tasks, manager)


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


def _task(spec: str) -> str | dict[str, Any]:
    if Path(spec).suffix in (".yaml", ".yml"):
        return _task_file(Path(spec))
    if Path(spec).suffix not in SUFFIXES:
        return spec
    raise InputError(f"{spec} is a file of rows: score it with --task, which says the same.")


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
