"""Domain tasks: rows of a file or a hub data set as prompts with choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hlora.data.chemistry import chemistry_rows
from hlora.data.encode import as_messages, is_chat, render_chat
from hlora.data.formats import FORMATS, Format, format_of
from hlora.data.parse import read_yaml
from hlora.data.read import ROWS, load_hub, missing, read_rows, suffix_of
from hlora.data.sandbox import Sandbox
from hlora.errors import InputError, suggest

CHEMISTRY = "chemistry"
"""The task that needs no file and no hub."""

ASSISTANT = "assistant"
Messages = list[dict[str, Any]]


def _printable(value: Any) -> Any:
    """What a template prints is text, or a number; not Python's word for something else."""
    for said, wrong in (
        ("missing", missing(value)),
        ("a list, not text", isinstance(value, (dict, list, tuple))),
        ("true or false, not text: write the word that is meant", isinstance(value, bool)),
    ):
        if wrong:
            raise ValueError(f"a value is {said}")
    return value


_SANDBOX = Sandbox(_printable)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: without trailing space.
        choices: as they follow the prompt, delimiter included.
        answer: index of the right choice.
        bare: the choices without the delimiter, whose length acc_norm divides by.
        where: the file and row.
        chat: prompt and completion as messages; `prompt` and `choices` are to be rendered.
        conversation: the answers in the prompt are learned too.
        learned: where they are in the rendered prompt, in characters.
        passed_over: some of them are not to be found there.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    bare: tuple[str, ...]
    where: str = field(default="", compare=False)
    chat: tuple[Messages, Messages] | None = None
    conversation: bool = False
    learned: tuple[tuple[int, int], ...] = ()
    passed_over: bool = False


@dataclass(frozen=True)
class Task:
    """A named list of examples."""

    name: str
    format: Format
    examples: list[Example]

    def rendered(self, tokenizer: Any) -> Task:
        """Chat messages as text, by the tokenizer's template.

        Raises:
            InputError: it has none, or one that does not go on where a prompt ends.
        """
        return replace(self, examples=[rendered(e, tokenizer) for e in self.examples])


def load_tasks(specs: Sequence[str], **settings: Any) -> list[Task]:
    """Several tasks, each with a name of its own: where two share one, the place where it is.

    Raises:
        InputError: as `load_task`; or one is given twice.
    """
    tasks = [load_task(spec, **settings) for spec in specs]
    names = [t.name for t in tasks]
    for a, b in itertools.combinations(specs, 2):
        if a == b:
            raise InputError(f"The task {a} is given twice.")
    return [
        replace(t, name=spec) if names.count(t.name) > 1 else t
        for t, spec in zip(tasks, specs, strict=True)
    ]


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
    built_in, _, side = where.partition("@")
    rows: Iterable[dict[str, Any]]
    if _is_file(where):
        rows, name = read_rows(path), path.name.split(".")[0]
    elif built_in == CHEMISTRY:
        rows, name = chemistry_rows(side or split), built_in
    elif where in FORMATS:
        given = given or FORMATS[where]
        hub = str(FORMATS[where].hub)
        rows, name = load_hub(f"{hub}@{given.test_split if split == 'test' else split}"), where
    else:
        rows, name = load_hub(where, split), where.split("/")[-1]
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


def check_task(where: str, format: str | None = None) -> None:
    """Refuse a task that is not there, or whose first row cannot be read. Of the hub nothing is.

    Raises:
        InputError: as `load_task`.
    """
    if _is_file(where):
        load_task(where, format=format, limit=1)
    elif format:
        _format(format)


def _is_file(where: str) -> bool:
    """Whether a task is a file here; otherwise its name is a known one, or can be the hub's."""
    path = Path(where)
    if path.is_dir():
        raise InputError(f"{where} is a folder: name the file with the task's rows.")
    if path.is_file():
        if suffix_of(path) not in ROWS:
            raise InputError(f"{where} holds no rows: a task is a file of {', '.join(ROWS)}.")
        return True
    known = [CHEMISTRY, *(n for n, f in FORMATS.items() if f.hub)]
    on_hub = "/" in where and suffix_of(path) not in ROWS
    if where.partition("@")[0] != CHEMISTRY and where not in known and not on_hub:
        listed = f". Known tasks: {', '.join(known)}."
        raise InputError(f"There is no task or file {where!r}" + suggest(where, known, listed))
    return False


def recognise(row: dict[str, Any], where: str) -> Format:
    """The format whose columns a row has, the one with most columns first.

    Raises:
        InputError: none fits.
    """
    fits = [f for f in FORMATS.values() if set(f.columns) <= row.keys()]
    if not fits:
        raise InputError(
            f"The columns of {where} ({', '.join(row)}) match no known task: give rows with prompt "
            "and completion, or a .yaml file that defines them with --task-format."
        )
    return max(fits, key=lambda f: len(f.columns))


def _format(name: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        listed = f": there are {', '.join(FORMATS)}."
        raise InputError(f"Unknown --task-format {name!r}" + suggest(name, FORMATS, listed))
    try:
        return format_of(path.stem, read_yaml(path, "task format"))
    except (TypeError, ValueError) as error:
        raise InputError(f"The task format {path} cannot be read: {error}") from None


def _render(template: str, row: dict[str, Any], where: str) -> str:
    try:
        return _SANDBOX.rendered(template, {k: v for k, v in row.items() if not missing(v)})
    except KeyError as error:
        empty = [k for k, v in row.items() if missing(v)]
        note = f" ({', '.join(empty)} empty)" if empty else ""
        raise InputError(
            f"{where}: {error.args[0]}; its columns are {', '.join(map(str, row))}{note}."
        ) from None
    except ValueError as error:
        raise InputError(f"{where}: the template {template!r}: {error}.") from None


def _listed(spec: str, row: dict[str, Any], where: str) -> tuple[str, ...]:
    """A list inside a row: `choices` or `choices.text`."""
    value: Any = row
    for part in spec.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{where}: there is no column {spec!r}.")
        value = value[part]
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {spec!r} is not a list.")
    if any(missing(v) or isinstance(v, (dict, list)) for v in value):
        raise InputError(f"{where}: {spec!r} has an entry that is no text.")
    return tuple(str(v) for v in value)


def _example(row: dict[str, Any], format: Format, where: str) -> Example:
    if format.name == "completion" and (
        is_chat(row.get("prompt")) or is_chat(row.get("completion"))
    ):
        sides = (
            _messages(row, "prompt", "user", where),
            _messages(row, "completion", ASSISTANT, where),
        )
        return Example("", ("",), 0, ("",), where, sides)
    if format.name == "messages":
        return Example("", ("",), 0, ("",), where, _conversation(row.get("messages"), where), True)
    prompt = _render(format.prompt, row, where)
    if isinstance(format.choices, str):
        bare = _listed(format.choices, row, where)
    else:
        bare = tuple(_render(c, row, where) for c in format.choices)
    answer = _answer(row, format, bare, where)
    choices = tuple(format.delimiter + c for c in bare)
    if not (prompt.strip() and all(c.strip() for c in bare)):
        raise InputError(f"{where}: an empty prompt or choice.")
    return Example(prompt, choices, answer, bare, where)


def _messages(row: dict[str, Any], column: str, role: str, where: str) -> Messages:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if not is_chat(value):
        raise InputError(f"{where}: {column!r} is neither text nor a list of chat messages.")
    return as_messages(value, where)


def _conversation(value: Any, where: str) -> tuple[Messages, Messages]:
    """What comes before the last answer of a conversation, and that answer."""
    if not is_chat(value):
        raise InputError(f"{where}: 'messages' is no list of chat messages (role and content).")
    answers = [i for i, m in enumerate(value) if m["role"] == ASSISTANT]
    if not answers or answers[-1] == 0:
        raise InputError(f"{where}: the messages hold no answer of the role {ASSISTANT!r}.")
    last = answers[-1]
    messages = as_messages(value[: last + 1], where)
    if not (messages[last]["content"].strip() or messages[last].get("tool_calls")):
        raise InputError(f"{where}: the last of the messages is an empty answer.")
    return messages[:last], messages[last:]


def rendered(example: Example, tokenizer: Any) -> Example:
    """An example whose chat messages are text, by the tokenizer's template.

    Raises:
        InputError: it has none, or one that does not go on where a prompt ends.
    """
    if example.chat is None:
        return example
    asked, answered = example.chat
    prompt = render_chat(tokenizer, asked, example.where, ask=True)
    whole = render_chat(tokenizer, [*asked, *answered], example.where)
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise InputError(
            f"{example.where}: by the tokenizer's chat template the completion does not follow the "
            "prompt: give both as text."
        )
    completion = (whole[len(prompt) :],)
    found = replace(example, prompt=prompt, choices=completion, bare=completion)
    if not example.conversation:
        return found
    spans: list[tuple[int, int]] = []
    earlier = [i for i, m in enumerate(asked) if i and m["role"] == ASSISTANT]
    for i in earlier:
        start = render_chat(tokenizer, asked[:i], example.where, ask=True)
        end = render_chat(tokenizer, asked[: i + 1], example.where)
        if prompt.startswith(end) and end.startswith(start):
            spans.append((len(start), len(end)))
    return replace(found, learned=tuple(spans), passed_over=len(spans) < len(earlier))


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


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
