"""Domain tasks: rows of a file or a hub data set as prompts with choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import torch
import yaml

from hlora.data.chemistry import chemistry_rows
from hlora.data.formats import FORMATS, Format, format_of
from hlora.data.read import ROWS, load_hub, read_rows
from hlora.data.rows import IGNORED, Row, Rows
from hlora.errors import InputError, suggest

CHEMISTRY = "chemistry"
"""The task that needs no file and no hub."""

_JINJA = jinja2.sandbox.SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: without trailing space.
        choices: as they follow the prompt, delimiter included.
        answer: index of the right choice.
        bare: the choices without the delimiter, whose length acc_norm divides by.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    bare: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A named list of examples."""

    name: str
    format: Format
    examples: list[Example]


def load_task(
    where: str, *, split: str = "train", format: str | None = None, limit: int | None = None
) -> Task:
    """A task by name (sciq, piqa, ...), from a local file, or from the hub.

    Args:
        where: a format's name, a .jsonl or .parquet file, `owner/name[:config][@split]`, or
            `chemistry[@split]`, the built-in one.
        split: `train` or `test`, for a task that comes from the hub.
        format: a format's name, or a .yaml file that defines one; None recognises the columns.
        limit: at most so many rows.

    Raises:
        InputError: no such task, unknown columns, a label out of range, an empty file.
    """
    given = _format(format) if format else None
    path = Path(where)
    if path.is_dir():
        raise InputError(f"{where} is a folder: name the file with the task's rows.")
    built_in, _, side = where.partition("@")
    rows: Iterable[dict[str, Any]]
    if path.is_file():
        rows = read_rows(path)
        name = path.name.split(".")[0]
    elif built_in == CHEMISTRY:
        rows, name = chemistry_rows(side or split), built_in
    elif where in FORMATS and FORMATS[where].hub:
        given = given or FORMATS[where]
        hub = str(FORMATS[where].hub)
        rows, name = load_hub(f"{hub}@{given.test_split if split == 'test' else split}"), where
    elif "/" in where and path.suffix not in ROWS:
        rows, name = load_hub(where, split), where.split("/")[-1]
    else:
        known = [CHEMISTRY, *(n for n, f in FORMATS.items() if f.hub)]
        listed = f". Known tasks: {', '.join(known)}."
        raise InputError(f"There is no task or file {where!r}" + suggest(where, known, listed))
    examples = []
    for number, row in enumerate(rows, 1):
        if given is None:
            given = recognise(row, where)
        examples.append(_example(row, given, f"{where}, row {number}"))
        if limit is not None and number >= limit:
            break
    if not examples or given is None:
        raise InputError(f"The task {where} has no rows.")
    return Task(name, given, examples)


def recognise(row: dict[str, Any], where: str) -> Format:
    """The format whose columns a row has, the one with most columns first.

    Raises:
        InputError: none fits.
    """
    fits = [f for f in FORMATS.values() if set(f.columns) <= row.keys()]
    if not fits:
        raise InputError(
            f"The columns of {where} ({', '.join(row)}) are no known task's: give rows with prompt "
            "and completion, or a .yaml file that defines them with --task-format."
        )
    return max(fits, key=lambda f: len(f.columns))


def _format(name: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        listed = f": there are {', '.join(FORMATS)}."
        raise InputError(f"Unknown --task-format {name!r}" + suggest(name, FORMATS, listed))
    try:
        return format_of(path.stem, dict(yaml.safe_load(path.read_text("utf-8"))))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"The task format {path} cannot be read: {error}") from None


@lru_cache(maxsize=256)
def _template(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)


def _render(template: str, row: dict[str, Any], where: str) -> str:
    try:
        return _template(template).render(**row)
    except jinja2.UndefinedError as error:
        raise InputError(f"{where}: {error}; its columns are {', '.join(row)}.") from None
    except jinja2.TemplateError as error:
        raise InputError(f"The template {template!r} is wrong: {error}.") from None


def _listed(spec: str, row: dict[str, Any], where: str) -> tuple[str, ...]:
    """A list inside a row: `choices` or `choices.text`."""
    value: Any = row
    for part in spec.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{where}: there is no column {spec!r}.")
        value = value[part]
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {spec!r} is not a list.")
    return tuple(str(v) for v in value)


def _example(row: dict[str, Any], format: Format, where: str) -> Example:
    prompt = _render(format.prompt, row, where)
    if isinstance(format.choices, str):
        bare = _listed(format.choices, row, where)
    else:
        bare = tuple(_render(c, row, where) for c in format.choices)
    answer = _answer(row, format, bare, where)
    choices = tuple(format.delimiter + c for c in bare)
    if not (prompt.strip() and all(c.strip() for c in bare)):
        raise InputError(f"{where}: an empty prompt or choice.")
    return Example(prompt, choices, answer, bare)


def _answer(row: dict[str, Any], format: Format, bare: tuple[str, ...], where: str) -> int:
    if isinstance(format.answer, int):
        return format.answer
    label = _render(format.answer, row, where)
    labels = format.labels
    if isinstance(labels, str):
        labels = _listed(labels, row, where)
    if labels:
        if label not in labels:
            raise InputError(f"{where}: the label {label!r} is none of {', '.join(labels)}.")
        return labels.index(label)
    if label not in {str(i) for i in range(len(bare))}:
        raise InputError(
            f"{where}: the label {label!r} is out of range: there are {len(bare)} choices, counted "
            "from 0."
        )
    return int(label)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it, as lm-evaluation-harness cuts them.

    The two are tokenized together and cut where the prompt alone would end; spaces at the end
    of the prompt belong to what follows.
    """
    bare = prompt.rstrip(" ")
    completion = prompt[len(bare) :] + completion
    whole = tokenizer(bare + completion, add_special_tokens=False, verbose=False)["input_ids"]
    head = tokenizer(bare, add_special_tokens=False, verbose=False)["input_ids"]
    return whole[: len(head)], whole[len(head) :]


def answer_rows(task: Task, tokenizer: Any, max_length: int) -> Rows:
    """The right answers of a task as rows, with the loss on the answer only.

    Prompts that do not fit into `max_length` tokens lose their beginning.
    """
    rows: list[Row] = []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for example in task.examples:
        head, tail = encode_pair(tokenizer, example.prompt, example.choices[example.answer])
        tail = (tail + end)[:max_length]
        head = head[max(0, len(head) + len(tail) - max_length) :]
        rows.append(
            {
                "input_ids": torch.tensor(head + tail),
                "labels": torch.tensor([IGNORED] * len(head) + tail),
            }
        )
    return Rows(rows)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
