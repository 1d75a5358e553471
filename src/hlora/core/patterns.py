"""Patterns that others wrote, tried where they can be stopped: some take for ever to match."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable

SECONDS = 10.0
_TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for p in patterns:
    try:
        for name in names:
            re.fullmatch(p, name)
            re.match(rf"(.*\.)?({p})$", name)
            re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name)
            re.match(rf"(^|.*\.){p}($|\..*)", name)
    except Exception:
        pass  # no pattern at all: PEFT says so
"""
"""The ways in which PEFT matches the patterns of an adapter. Python cannot stop a match, but a
process that does not end."""


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse patterns that take longer than SECONDS to be matched against all names.

    Raises:
        ValueError: names those that were tried.
    """
    choosing = sorted({p for p in patterns if re.search(r"[*+?{|(]", p)})  # others are fast
    if not choosing:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY], input=json.dumps([choosing, [*names]]),
            text=True, encoding="utf-8", capture_output=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        shown = ", ".join(repr(p[:60]) for p in choosing[:3])
        raise ValueError(f"the pattern {shown} takes for ever to match") from None
