"""Settings from the command line and from YAML, by the dataclasses of `hlora.run.settings`."""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hlora.errors import InputError, suggest

S = TypeVar("S")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message[:1].upper() + message[1:] + ".")


class _Format(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        super().__init__(prog, max_help_position=min(30, width // 3), width=width)


def parse(cls: type[S], argv: list[str], prog: str) -> S:
    """Settings of one command: defaults, then --config, then the command line.

    Raises:
        InputError: an unknown setting (the nearest one is named), a wrong value, a missing one.
    """
    everything = "--help-all" in argv
    parser = _parser(cls, prog, everything)
    if everything or "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    argv, training = _take_training([_with_dashes(a) for a in argv])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(
            _unknown(unknown[0], (o for a in parser._actions for o in a.option_strings))
        )
    given = vars(known)
    values = _from_yaml(cls, given.pop("config", None))
    values |= given
    if training:
        values["training"] = {**values.get("training", {}), **training}
    return build(cls, values)


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
            raise InputError(_unknown(key, known))
        result[key] = _checked(key, value, hints[key], known[key])
    for name, f in known.items():
        if f.metadata.get("required") and result.get(name) in (None, [], ""):
            called = (
                f.metadata["metavar"] if f.metadata["positional"] else f"--{name.replace('_', '-')}"
            )
            raise InputError(f"{called} is missing: {f.metadata['help']}.")
    return cls(**result)


def _parser(cls: type, prog: str, everything: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description=cls.__doc__, formatter_class=_Format, allow_abbrev=False,
        add_help=False, argument_default=argparse.SUPPRESS, usage=f"{prog} [options]",
    )  # fmt: skip
    hints = get_type_hints(cls)
    hidden = 0
    for f in sorted(fields(cls), key=lambda f: not f.metadata["required"]):
        if f.name == "training":
            if everything:
                parser.add_argument("--training.NAME", metavar="VALUE", help=f.metadata["help"])
            continue
        hide = f.metadata["more"] and not everything
        hidden += hide
        kind, several = _kind(hints[f.name])
        options: dict[str, Any] = {"help": argparse.SUPPRESS if hide else _help(f, kind)}
        flag = f"--{f.name.replace('_', '-')}"
        if kind is bool:
            options["action"] = "store_true"
            parser.add_argument(
                f"--no-{flag[2:]}", dest=f.name, action="store_false", help=argparse.SUPPRESS
            )
        else:
            options["metavar"] = f.metadata["metavar"] or kind.__name__.upper().replace("STR", "X")
            if f.metadata["choices"]:
                options["metavar"] = "|".join(f.metadata["choices"])
            options |= {"nargs": "+", "action": "extend"} if several else {}
        if f.metadata["positional"]:
            parser.add_argument(f.name, nargs="?", help=options["help"], metavar=options["metavar"])
            continue
        parser.add_argument(flag, dest=f.name, **options)
    if any(f.name == "model" for f in fields(cls)):
        parser.add_argument("--config", metavar="FILE", help="settings from a YAML file")
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    more = f"every setting ({hidden} more)" if hidden else argparse.SUPPRESS
    parser.add_argument("--help-all", action="store_true", help=more)
    return parser


def _help(f: Field, kind: type) -> str:
    text = str(f.metadata["help"]).replace("%", "%%")
    if f.metadata["required"]:
        return f"{text} (required)"
    default = _default(f)
    if default in (None, [], {}) or kind is bool:
        return text
    shown = (
        " ".join(default)
        if isinstance(default, list)
        else f"{default:g}"
        if kind in (int, float)
        else default
    )
    return f"{text} (default: {shown})"


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there are several."""
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None)), False
    return (dict if get_origin(hint) is dict else hint), False


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _checked(key: str, value: Any, hint: Any, f: Field) -> Any:
    kind, several = _kind(hint)
    name = f"--{key.replace('_', '-')}"
    if value is None:
        return _default(f)
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


def _from_yaml(cls: type, file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The settings file {file} cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        raise InputError(f"The settings file {file} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"The settings file {file} must map names to values.")
    values = {str(k).replace("-", "_"): v for k, v in values.items()}
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise InputError(f"{file}: {_unknown(key, known)}")
    return values


def _with_dashes(word: str) -> str:
    """Trainer's users write --max_steps."""
    if not word.startswith("--") or word.startswith("--training."):
        return word
    name, sep, value = word.partition("=")
    return name.replace("_", "-") + sep + value


def _take_training(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate `--training.NAME VALUE` (or `=VALUE`) from the rest; values are read as YAML."""
    import yaml

    rest: list[str] = []
    training: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--training."):
            rest.append(word)
            continue
        name, sep, value = word.removeprefix("--training.").partition("=")
        if not sep:
            value = next(words, "")
        if not value:
            raise InputError(f"--training.{name} needs a value.")
        try:
            training[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            training[name] = value
    return rest, training


def _unknown(word: str, known: Iterable[str]) -> str:
    return f"Unknown setting {word}" + suggest(word.partition("=")[0], known, "; see --help.", 0.5)


def command_line(command: str, settings: Any) -> str:
    """The command that gives these settings; defaults are left out."""
    words = ["hlora", command]
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value == _default(f) or f.name == "training":
            continue
        flag = f"--{f.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(str(v) for v in (value if isinstance(value, list) else [value]))]
    words += [f"--training.{k}={v}" for k, v in getattr(settings, "training", {}).items()]
    return shlex.join(words)
