"""The results of a study as JSON lines, one a run, and what each line holds."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from hlora.errors import InputError
from hlora.run.means import mean_se


class RunLine(TypedDict):
    """What a run is."""

    method: str
    task: str
    seed: int
    phi: float | None


class TextLine(TypedDict, total=False):
    """The scores on a kind of text."""

    loss: float
    loss_se: float
    perplexity: float
    tokens: int
    blocks: list[float]
    divergences: list[float]


class Line(TypedDict, total=False):
    """One run.

    Every line has `key` (a hash of all that makes the run what it is), `run`, and `error`: None, or
    why it failed. One that succeeded also has the scores: `text` by kind, with the fields of
    `hlora.run.evaluate.TextScore` (older lines lack the blocks), and `task`, with those of
    `TaskScore`. `answers` is the choice that the model made for each question, `losses` the NLL of
    the right one; `others` are tasks that were not trained on. Forgetting is by kind of text, and
    over all that were `seen` and `unseen`, as {nats, se}. `budgeted` is what `hlora tune` says of a
    budget: predicted, measured, and the share of the change that it kept. `apart` are kinds that a
    report counts as neither seen nor unseen.
    """

    key: str
    run: RunLine
    label: str
    error: str | None
    study: dict[str, Any]
    task_files: dict[str, str]
    seen: list[str]
    unseen: list[str]
    apart: list[str]
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
    budgeted: dict[str, float | None] | None
    log: list[dict[str, float]]
    norms: dict[str, float]
    text: dict[str, TextLine]
    task: dict[str, float]
    answers: list[int | None]
    losses: list[float]
    others: dict[str, dict[str, Any]]
    forgetting: dict[str, dict[str, float]]


_ALWAYS = ("key", "run")
_OF_A_SUCCESS = ("study", "seen", "unseen", "text", "task", "forgetting", "versions")
_WITHIN = {
    "text": ("loss", "tokens"), "forgetting": ("nats", "se"), "task": ("acc", "acc_norm", "nll"),
}  # fmt: skip
"""What each entry must have; a task is one."""


def checked(line: Mapping[str, Any], where: str) -> Line:
    """The line, if it has what every line must have.

    Raises:
        InputError: names what is missing or of the wrong type.
    """
    for name in _ALWAYS if line.get("error") else (*_ALWAYS, *_OF_A_SUCCESS):
        if name not in line:
            raise InputError(f"{where}: not a line of a study: {name!r} is missing.")
    for name, hint in get_type_hints(Line).items():
        if name in line and not _fits(line[name], hint):
            raise InputError(f"{where}: not a line of a study: {name!r} is not as it should be.")
    if not line.get("error"):
        for name, keys in _WITHIN.items():
            for entry in [line[name]] if name == "task" else line[name].values():
                if missing := [k for k in keys if entry.get(k) is None]:
                    raise InputError(f"{where}: {name} lacks {missing[0]!r}.")
    return line  # type: ignore[return-value]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type."""
    kinds = get_args(hint)
    if hint is Any:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, kind) for kind in kinds)
    if is_typeddict(hint):
        hints = get_type_hints(hint)
        whole = isinstance(value, dict) and hint.__required_keys__ <= value.keys()
        return whole and all(k not in hints or _fits(v, hints[k]) for k, v in value.items())
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(v, kinds[1]) for v in value.values())
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, kinds[0]) for v in value)
    if hint in (int, float):
        kind = (int, float) if hint is float else int
        fits = isinstance(value, kind) and not isinstance(value, bool)
        return fits and (isinstance(value, float) or abs(value) < 2**63)
    return isinstance(value, hint)


def kinds_of(line: Line, group: str) -> list[str]:
    """The kinds of text of a group: `seen`, `unseen` or `apart`."""
    return list(cast(Any, line).get(group, []))


def with_apart(line: Line, base: Line, apart: Collection[str]) -> Line:
    """The line with these kinds of text neither seen nor unseen, its forgetting pooled anew.

    Raises:
        InputError: it lacks the losses of the blocks, of which each counts once.
    """
    groups = {g: [k for k in kinds_of(line, g) if k not in apart] for g in ("seen", "unseen")}
    forgetting = {k: v for k, v in line["forgetting"].items() if k not in groups}
    for group, kinds in groups.items():
        lost = []
        for kind in kinds:
            before, after = (of["text"][kind].get("blocks") for of in (base, line))
            if not before or not after:
                raise InputError(
                    f"--apart needs runs that kept every block's loss; {kind} has none."
                )
            lost += [b - a for a, b in zip(before, after, strict=True)]
        if lost:
            forgetting[group] = dict(zip(("nats", "se"), mean_se(lost), strict=True))
    named = [k for k in line["text"] if k in apart]
    return cast(Line, {**line, **groups, "apart": named, "forgetting": forgetting})


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
        except (ValueError, RecursionError):
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
