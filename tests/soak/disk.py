"""Disks that are full: a command ends in one sentence, and goes on when there is room."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.soak.kills import Kills, clear
from tests.soak.runs import run


def full(kills: list[Kills], count: int, part: int, parts: int) -> Counter:
    """Each command on disks that take files of so many bytes and no larger ones."""
    found: Counter = Counter()
    largest = max(p.stat().st_size for k in kills for p in Path(k.command.name).rglob("*"))
    for number in range(part, count, parts):
        k = kills[number % len(kills)]
        output = f"{k.command.name}-{part}"
        clear(output)
        size = round((number // len(kills)) ** 2 / (count / len(kills)) ** 2 * largest)
        first = run(k.command.argv(output), largest=size)
        where = f"{k.command.name}, disk full"
        lines = [line for line in first.said.splitlines() if line.startswith("hlora: ")]
        if first.traceback or first.status not in (0, 1, 2) or (first.status and len(lines) != 1):
            print(f"{size} bytes: {first.said[-1500:]}", flush=True)
            found[f"{where}: TRACEBACK"] += 1
        elif not first.status and k.command.found(output) != k.whole:
            found[f"{where}: SILENTLY DIFFERENT"] += 1
        elif not first.status:
            found[f"{where}: there was room"] += 1
        else:
            again = run(k.command.again(output))
            found[f"{where}: said, then {k.outcome(output, again)}"] += 1
    return found
