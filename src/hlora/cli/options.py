"""Settings from the command line and from YAML, by the dataclasses of `hlora.run.settings`."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from hlora.data.parse import read_yaml
from hlora.errors import InputError
from hlora.run.build import build, default_of, kind_of, unknown_setting
from hlora.run.settings import DOTTED

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
    argv, dotted = _take_dotted([_with_dashes(a) for a in argv])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(
            unknown_setting(unknown[0], (o for a in parser._actions for o in a.option_strings))
        )
    given = vars(known)
    values = _from_yaml(cls, given.pop("config", None))
    values |= given
    for name, of in dotted.items():
        values[name] = {**values.get(name, {}), **of}
    return build(cls, values)


def _parser(cls: type, prog: str, everything: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description=cls.__doc__, formatter_class=_Format, allow_abbrev=False,
        add_help=False, argument_default=argparse.SUPPRESS, usage=f"{prog} [options]",
    )  # fmt: skip
    hints = get_type_hints(cls)
    hidden = 0
    for f in sorted(fields(cls), key=lambda f: not f.metadata["required"]):
        if f.name in DOTTED:
            if everything:
                parser.add_argument(f"--{f.name}.NAME", metavar="VALUE", help=f.metadata["help"])
            continue
        hide = f.metadata["more"] and not everything
        hidden += hide
        kind, several = kind_of(hints[f.name])
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
    default = default_of(f)
    if default in (None, [], {}) or kind is bool:
        return text
    if isinstance(default, list):
        default = " ".join(default)
    return f"{text} (default: {f'{default:g}' if kind in (int, float) else default})"


def _from_yaml(cls: type, file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    values = read_yaml(Path(file), "settings file")
    values = {str(k).replace("-", "_"): v for k, v in values.items()}
    known = [f.name for f in fields(cls)]
    if unknown := [key for key in values if key not in known]:
        raise InputError(f"{file}: {unknown_setting(unknown[0], known)}")
    return values


def _with_dashes(word: str) -> str:
    """Trainer's users write --max_steps."""
    if not word.startswith("--") or _dotted(word):
        return word
    name, sep, value = word.partition("=")
    return name.replace("_", "-") + sep + value


def _dotted(word: str) -> str | None:
    """Of `--training.NAME`, `training`."""
    return next((of for of in DOTTED if word.startswith(f"--{of}.")), None)


def _take_dotted(argv: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Separate `--training.NAME VALUE` (or `=VALUE`) and the like from the rest."""
    rest: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    words = iter(argv)
    for word in words:
        of = _dotted(word)
        if of is None:
            rest.append(word)
            continue
        name, sep, value = word.removeprefix(f"--{of}.").partition("=")
        if not sep:
            value = next(words, "")
        if not value:
            raise InputError(f"--{of}.{name} needs a value.")
        found.setdefault(of, {})[name] = value
    return rest, found
