"""What can go wrong, each as one sentence that says what to do about it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from importlib import import_module
from numbers import Real
from typing import Any
from unicodedata import category


def visible(text: str) -> str:
    """The text with everything that does not print, but for line breaks, as its escape.

    Names come from files that others wrote; a terminal would obey their control characters.
    """
    return "".join(
        c if c.isprintable() or c == "\n" or category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


def one_line(error: BaseException, most: int = 200) -> str:
    """What another library's error says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def is_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, of a device or of the machine, is not enough."""
    said = "out of memory", "can't allocate memory", "unable to allocate"
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in said)


def in_short(names: Iterable[str], most: int = 4) -> str:
    """Parameters or modules, those of all layers as one: `layers.*.mlp.up_proj (24), score`."""
    alike: dict[str, list[str]] = {}
    for n in (n.removeprefix("base_model.model.") for n in names):
        alike.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", n), []).append(n)
    most_common = sorted(alike.items(), key=lambda of: -len(of[1]))
    shown = [f"{n} ({len(of)})" if len(of) > 1 else of[0] for n, of in most_common[:most]]
    return ", ".join(shown) + (f" and {len(alike) - most} more" if len(alike) > most else "")


class HloraError(Exception):
    """Base of every error that hlora raises on purpose. Its text is meant for the user."""

    def __str__(self) -> str:
        return visible(super().__str__()).replace("\n", "\\n")


class InputError(HloraError):
    """A setting, file or folder that the user gave cannot be used."""


class UnsupportedModelError(HloraError):
    """The model or its adapter has a feature that the method cannot account for."""


class MismatchError(HloraError):
    """An importance folder belongs to another model, or to other LoRA settings."""


class StoreError(HloraError):
    """A file of an importance folder is missing, damaged or changed."""


class DivergedError(HloraError):
    """Losses, gradients or weights are not finite: training cannot go on."""


class HubError(HloraError):
    """A finished result could not be uploaded; it is on the disk."""


def one_of(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raise InputError if the value is none of those allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise InputError(f"{what} must be one of {', '.join(allowed)}, not {value!r}.")


def whole(what: str, value: int, least: int) -> None:
    """Raise InputError for what is no whole number, or one below the least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} must be a whole number of {least} or more, not {value!r}.")


def is_number(value: object) -> bool:
    """Whether it is a finite number: no text that reads as one, and not True."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def suggest(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """How a sentence ends: `; did you mean NAME?`, or `otherwise` where nothing is near.

    Args:
        cutoff: how alike two names must be, of 1.
    """
    near = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f"; did you mean {near[0]}?" if near else otherwise


def refuse_unknown(given: Iterable[Any], known: Iterable[Any], what: str) -> None:
    """Raise InputError at the first name that is not known; it names the nearest that is."""
    known = list(known)
    for name in given:
        if name not in known:
            names = [str(k) for k in known]
            listed = f": there are {', '.join(names)}."
            raise InputError(f"{what} {name!r}" + suggest(str(name), names, listed, 0.4))


def optional(module: str, what: str, extra: str) -> Any:
    """A module that comes with one of the package's extras, imported where it is first needed.

    Raises:
        InputError: it is missing; `what` begins the sentence, such as `Figures need`.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise InputError(f"{what} {missing}: pip install 'hlora[{extra}]'.") from None
