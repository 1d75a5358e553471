"""How rows of a task read as prompts with choices. The built-in ones are in `formats.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from hlora.data.parse import parse_yaml


@dataclass(frozen=True)
class Format:
    """How rows of a task are read.

    Attributes:
        name: as given to --task-format.
        columns: a file whose rows have all of these is recognised as this task.
        prompt: template of the question.
        choices: a template for each choice, or the one name of a column that lists them.
        answer: the right choice: its index, or a template that gives an index or one of `labels`.
        labels: a column (or fixed names) that an answer's label is looked up in.
        hub: the data set on the hub, `owner/name[:config]`.
        test_split: the hub's split with public labels.
        delimiter: between the prompt and a choice.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    choices: tuple[str, ...] | str
    answer: int | str
    labels: tuple[str, ...] | str = ()
    hub: str | None = None
    test_split: str = "test"
    delimiter: str = " "


def format_of(name: str, values: dict[str, Any]) -> Format:
    """A format from the values of a YAML file.

    Raises:
        TypeError, ValueError: a key that no format has, or one that is missing.
    """
    known = [f.name for f in fields(Format)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r}, known: {', '.join(known)}")
    answer = values.get("answer")
    if isinstance(answer, str) and answer.isdecimal() and not values.get("labels"):
        values = {**values, "answer": int(answer)}
    for key, value in values.items():
        wanted = (str, list) if key in ("columns", "choices", "labels") else (str, int)
        if not isinstance(value, wanted) or (key != "answer" and isinstance(value, int)):
            raise ValueError(f"{key} cannot be {value!r}")
        if isinstance(value, list) and not all(isinstance(v, str) for v in value):
            raise ValueError(f"{key} must be a list of texts")
    lists = {k: tuple(map(str, v)) for k, v in values.items() if isinstance(v, list)}
    return Format(**{"name": name, "columns": (), **values, **lists})


FORMATS = {
    name: format_of(name, values)
    for name, values in parse_yaml(
        files("hlora.data").joinpath("formats.yaml").read_text("utf-8")
    ).items()
}
