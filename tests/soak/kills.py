"""Commands killed before a file operation or after some time, and then started again."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from tests.soak.place import COMMANDS, Command, recorded
from tests.soak.runs import KILLED, Ended, run


class Kills:
    """What a command makes when nobody kills it, and what it makes when somebody does."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.first = run(command.argv(command.name))
        self.whole = command.found(command.name)
        if self.first.status or not self.whole:
            raise SystemExit(f"{command.name} failed: {self.first.said[-2000:]}")

    def try_one(self, where: str, output: str, **kill: float) -> Counter:
        """Kill it, start it again, and compare."""
        name, command = self.command.name, self.command
        clear(output)
        first = run(command.argv(output), **kill)  # type: ignore[arg-type]
        if first.status not in (KILLED, -9):
            return Counter()
        again = run(command.again(output))
        return Counter({f"{name}, {where}: {self.outcome(output, again)}": 1})

    def outcome(self, output: str, again: Ended) -> str:
        if again.traceback:
            said = "TRACEBACK"
        elif again.status:
            said = "REFUSED"
        elif self.command.found(output) != self.whole:
            said = "DIFFERENT"
        elif left := self.command.left(output):
            said = "LEFTOVERS"
            print(left)
        else:
            return "finished to the same bits"
        print(f"{said}: {again.said[-1500:]}", flush=True)
        return said


def before_each(kills: list[Kills], every: int, part: int, parts: int) -> Counter:
    """A kill before each file operation, or each n-th."""
    found: Counter = Counter()
    points = [(k, at) for k in kills for at in range(0, k.first.operations, every)]
    for k, at in points[part::parts]:
        found += k.try_one("killed before a file operation", f"{k.command.name}-{part}", kill_at=at)
    return found


def at_random(kills: list[Kills], count: int, part: int, parts: int) -> Counter:
    """A kill after a time that is drawn."""
    found: Counter = Counter()
    draw = random.Random(part)
    while found.total() < len(range(part, count, parts)):  # some end before they are killed
        k = kills[(found.total() * parts + part) % len(kills)]
        after = draw.uniform(0, k.first.seconds)
        found += k.try_one("killed at a random time", f"{k.command.name}-{part}", kill_after=after)
    return found


def prepared() -> list[Kills]:
    """Each command, run once."""
    return [Kills(c) for c in COMMANDS]


def clear(output: str) -> None:
    for path in (output, f"{output}-work", recorded(output)):
        shutil.rmtree(path, ignore_errors=True)
    Path(f"{output}.jsonl").unlink(missing_ok=True)
