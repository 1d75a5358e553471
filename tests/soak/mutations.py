"""Every file that is read, damaged: it is refused in one sentence, or read.

Where a checksum would stop the damage, the file is also signed again, as a forger can. Without
that, nothing that is read may differ from what was written.
"""

from __future__ import annotations

import contextlib
import io
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlora.cli import main as cli
from hlora.errors import HloraError
from tests.soak.damage import damaged

SECONDS = 30
"""What reading one file may take."""


@dataclass(frozen=True)
class Reader:
    """How a file is read.

    Attributes:
        read: returns what was read, in a form that can be compared.
        sign: makes the checksums right again; None where there are none.
        share: how often the file is damaged, in relation to the others.
        before: puts in place what the last reading may have changed.
    """

    path: Path
    read: Callable[[], Any]
    sign: Callable[[], Any] | None = None
    share: int = 10
    before: Callable[[], Any] = lambda: None

    @property
    def name(self) -> str:
        return str(self.path)


class Slow(BaseException):
    """It takes too long."""


def command(*argv: str) -> str:
    """Run a command here; what it printed.

    Raises:
        HloraError: it refused.
    """
    said, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        status = cli.main(list(argv))
    if status:
        raise HloraError(said.getvalue())
    return out.getvalue()


def mutate(readers: list[Reader], count: int, part: int, parts: int) -> Counter:
    """So many damaged files in all, of which this part tries its share."""
    found: Counter = Counter()
    total = sum(r.share for r in readers)
    for index, reader in enumerate(readers):
        reader.before()
        value = reader.read()  # which must be
        for number in range(part, max(2, count * reader.share // total), parts):
            signed = reader.sign is not None and number // parts % 2 == 0
            draw = random.Random(1000 * index + number)
            found += _one(reader, draw, signed, value)
    return found


def _one(reader: Reader, draw: random.Random, signed: bool, written: Any) -> Counter:
    reader.before()
    good = reader.path.read_bytes()
    bad = damaged(draw, good)
    kept = {p: p.read_bytes() for p in reader.path.parent.iterdir() if p.is_file()}
    reader.path.write_bytes(bad)
    if signed and reader.sign:
        reader.sign()
    try:
        with bounded():
            value = reader.read()
        if reader.sign is None or signed:
            outcome = "read"
        elif value == written:
            outcome = "read as it was written"
        else:
            outcome = "SILENTLY DIFFERENT"
    except HloraError as error:
        outcome = "refused" if str(error).strip() else "REFUSED WITHOUT A WORD"
    except Slow:
        outcome = "ENDLESS"
    except BaseException:
        outcome = "TRACEBACK"
        print(f"{reader.name}: {bad[:300]!r}\n{traceback.format_exc()[-1500:]}", flush=True)
    for path, content in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if outcome.isupper():
        print(f"{outcome}: {reader.name}, signed again: {signed}", flush=True)
    again = ", signed again" if signed else ""
    return Counter({f"{reader.name}{again}: {outcome}": 1})


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
