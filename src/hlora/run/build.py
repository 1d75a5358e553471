"""Settings from plain values, checked; and the command line that gives them."""

from __future__ import annotations

import contextlib
import enum
import math
import shlex
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hlora.data.parse import parse_yaml
from hlora.errors import InputError, one_of, suggest
from hlora.run.settings import DOTTED

S = TypeVar("S")


def build(cls: type[S], values: dict[str, Any]) -> S:
    """Settings from plain values, checked.

    Raises:
        InputError: an unknown or missing setting, or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    result = {}
    for key, value in values.items():
        if key not in known:
            raise InputError(unknown_setting(key, known))
        result[key] = _checked(key, value, hints[key], known[key])
    for name, f in known.items():
        if f.metadata.get("required") and result.get(name) in (None, [], ""):
            called = (
                f.metadata["metavar"] if f.metadata["positional"] else f"--{name.replace('_', '-')}"
            )
            raise InputError(f"{called} is missing: {f.metadata['help']}.")
    return cls(**result)


def kind_of(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there are several."""
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None)), False
    return (dict if get_origin(hint) is dict else hint), False


def default_of(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _checked(key: str, value: Any, hint: Any, f: Field) -> Any:
    kind, several = kind_of(hint)
    name = f"--{key.replace('_', '-')}"
    if value is None:
        return default_of(f)
    if kind is dict:
        if not isinstance(value, dict):
            raise InputError(f"{name} must be a mapping of names to values.")
        of = training_value if key == "training" else _peft_value
        return {str(k): of(str(k), v) for k, v in value.items()}
    if several:
        values = value if isinstance(value, list) else [value]
        return [_one(name, v, kind, f) for v in values]
    if isinstance(value, list):
        raise InputError(f"{name} takes one value, not {len(value)}.")
    return _one(name, value, kind, f)


def _one(name: str, value: Any, kind: type, f: Field) -> Any:
    value = _converted(name, value, kind)
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {value}.")
    least, most = f.metadata["least"], f.metadata["most"]
    if most is None and kind is int:
        most = 2**31 - 1
    if least is not None and not value >= least:
        raise InputError(f"{name} must be at least {least:g}, not {value:g}.")
    if most is not None and not value <= most:
        raise InputError(f"{name} must be at most {most}, not {value:g}.")
    if f.metadata["choices"]:
        one_of(name, value, f.metadata["choices"])
    return value


_WORDS = {
    "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False,
}  # fmt: skip


def _converted(name: str, value: Any, kind: type) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if kind is bool:
            return value if isinstance(value, bool) else _WORDS[value.lower()]
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ValueError
        if kind is int and not isinstance(value, int):
            number = float(value)
            return int(value) if isinstance(value, str) and value.isdecimal() else _whole(number)
        found = kind(value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        shown = f"{str(value)[:60]!r}" if isinstance(value, str) else str(value)[:60]
        raise InputError(f"{name} must be {words.get(kind, 'text')}, not {shown}.") from None
    if kind is float and not found and set("123456789") & set(str(value).lower().partition("e")[0]):
        raise InputError(f"{name} is too small to be told from 0: {str(value)[:60]}.")
    return found


def _whole(number: float) -> int:
    if number % 1:
        raise ValueError
    return int(number)


def plain(value: Any) -> Any:
    """The value that text stands for where no type is known: null, true, false or a number."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if not isinstance(value, str):
        return value
    if value in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[value]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def training_value(name: str, value: Any) -> Any:
    """A value for a field of TrainingArguments: text is converted by the field's type.

    Raises:
        InputError: the field takes no such value.
    """
    value = _training_value(name, value)
    unlimited = name == "max_grad_norm" and value == math.inf
    if isinstance(value, float) and not math.isfinite(value) and not unlimited:
        raise InputError(f"--training.{name} must be a finite number, not {value}.")
    return value


def _peft_value(name: str, value: Any) -> Any:
    """Text stands for a number, a truth value or, in brackets, a list."""
    if isinstance(value, str) and value[:1] in _BRACKETS:
        return _bracketed(f"--peft.{name}", value)
    return plain(value)


_BRACKETS = ("{", "[")


def _bracketed(name: str, value: str) -> Any:
    try:
        return plain(parse_yaml(value))
    except ValueError as error:
        raise InputError(f"{name}: {error}.") from None


def _training_value(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return plain(value)
    from transformers import TrainingArguments

    hint = _hints(TrainingArguments).get(name)
    kinds = set(get_args(hint) or (hint,))
    if hint is None or (type(None) in kinds and value.lower() in ("null", "none")):
        return plain(value) if hint is None else None
    if value[:1] in _BRACKETS:
        return _bracketed(f"--training.{name}", value)
    if str in kinds or any(isinstance(k, type) and issubclass(k, enum.Enum) for k in kinds):
        return _WORDS[value] if bool in kinds and value in ("true", "false") else value
    for kind in (bool, int, float):
        if kind in kinds:
            if kind is int and float in kinds:
                return plain(value)
            return _converted(f"--training.{name}", value, kind)
    return plain(value)


def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields; one that its module names and never imports is any."""
    known: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(cls, localns=known)
        except NameError as error:
            known[str(error.name)] = Any


def unknown_setting(word: str, known: Iterable[str]) -> str:
    name = word.partition("=")[0]  # what follows may be a secret
    return f"Unknown setting {name}" + suggest(name, known, "; see --help.", 0.5)


def command_line(command: str, settings: Any) -> str:
    """The command that gives these settings; defaults are left out."""
    words = ["hlora", command]
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value == default_of(f) or f.name in DOTTED:
            continue
        flag = f"--{f.name.replace('_', '-')}"
        if f.metadata["positional"]:
            words.append(value)
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(str(v) for v in (value if isinstance(value, list) else [value]))]
    words += [f"--{of}.{k}={v}" for of in DOTTED for k, v in getattr(settings, of, {}).items()]
    return shlex.join(words)
