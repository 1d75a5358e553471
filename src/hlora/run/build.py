"""Settings from plain values, checked; and the command line that gives them."""

from __future__ import annotations

import math
import shlex
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hlora.errors import InputError, suggest

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


def read_yaml(file: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` it is begins the sentence of an InputError."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{what} {file} cannot be read as YAML: {said}") from None
    if not isinstance(values, dict):
        raise InputError(f"{what} {file} must map names to values.")
    return values


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
        return value
    if several:
        values = value if isinstance(value, list) else [value]
        return [_converted(name, v, kind) for v in values]
    if isinstance(value, list):
        raise InputError(f"{name} takes one value, not {len(value)}.")
    value = _converted(name, value, kind)
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {value}.")
    least = f.metadata["least"]
    if least is not None and not value >= least:
        raise InputError(f"{name} must be at least {least:g}, not {value:g}.")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise InputError(
            f"{name} must be one of {', '.join(f.metadata['choices'])}, not {value!r}."
        )
    return value


def _converted(name: str, value: Any, kind: type) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError):
        raise InputError(f"{name} must be {words.get(kind, 'text')}, not {value!r}.") from None


def unknown_setting(word: str, known: Iterable[str]) -> str:
    return f"Unknown setting {word}" + suggest(word.partition("=")[0], known, "; see --help.", 0.5)


def command_line(command: str, settings: Any) -> str:
    """The command that gives these settings; defaults are left out."""
    words = ["hlora", command]
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value == default_of(f) or f.name == "training":
            continue
        flag = f"--{f.name.replace('_', '-')}"
        if f.metadata["positional"]:
            words.append(value)
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(str(v) for v in (value if isinstance(value, list) else [value]))]
    words += [f"--training.{k}={v}" for k, v in getattr(settings, "training", {}).items()]
    return shlex.join(words)
