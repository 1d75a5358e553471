"""The results of a study as JSON lines, one a run, and what each line holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from hlora.errors import InputError


class RunLine(TypedDict):
    """What a run is."""

    method: str
    task: str
    seed: int
    phi: float | None


class Line(TypedDict, total=False):
    """One run.

    Every line has `key` (a hash of all that makes the run what it is), `run`, and `error`: None, or
    why it failed. One that succeeded also has the scores: `text` by kind, with the fields of
    `hlora.run.evaluate.TextScore` (older lines lack the blocks), and `task`, with those of
    `TaskScore`. `answers` is the choice that the model made for each question. Forgetting is by
    kind of text, and over all that were `seen` and `unseen`, as {nats, se}.
    """

    key: str
    run: RunLine
    label: str
    error: str | None
    study: dict[str, Any]
    task_files: dict[str, str]
    seen: list[str]
    unseen: list[str]
    versions: dict[str, str | None]
    machine: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float | None]
    seconds_total: float
    steps: int
    recorded: dict[str, Any]
    importance_bytes: int
    adapter_bytes: int
    peak_bytes: int | None
    log: list[dict[str, float]]
    norms: dict[str, float]
    text: dict[str, dict[str, Any]]
    task: dict[str, float]
    answers: list[int | None]
    forgetting: dict[str, dict[str, float]]


_ALWAYS = {"key": str, "run": dict}
_OF_A_SUCCESS = {
    "study": dict, "seen": list, "unseen": list, "text": dict, "task": dict, "forgetting": dict,
}  # fmt: skip


def checked(line: Mapping[str, Any], where: str) -> Line:
    """The line, if it has what every line must have.

    Raises:
        InputError: names what is missing or of the wrong type.
    """
    needed = _ALWAYS if line.get("error") else {**_ALWAYS, **_OF_A_SUCCESS}
    for name, kind in needed.items():
        if not isinstance(line.get(name), kind):
            raise InputError(
                f"{where}: not a line of a study: {name!r} is missing, or is no {kind.__name__}."
            )
    for name in RunLine.__annotations__:
        if name not in line["run"]:
            raise InputError(f"{where}: not a line of a study: run.{name} is missing.")
    return line  # type: ignore[return-value]


def groups_of_text(held_out: list[str], general: list[str]) -> dict[str, list[str]]:
    """Kinds of text by `seen` (the general phase read such text) and `unseen`."""
    return {
        "seen": [k for k in held_out if k in general],
        "unseen": [k for k in held_out if k not in general],
    }


def read_lines(path: Path) -> list[Line]:
    """The runs in a results file; a half-written last line is passed over.

    Raises:
        InputError: a line that is none of a study's, by its number.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as results ({error}).") from None
    results: list[Line] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON.") from None
            continue
        if not isinstance(result, dict):
            raise InputError(f"{path}, line {number}: not a JSON object.")
        results.append(checked(result, f"{path}, line {number}"))
    return results


def drop_half_line(path: Path) -> None:
    """What a killed study left of its last line."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def append(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
