"""A command in a process of its own that dies or fails where it is told to."""

from __future__ import annotations

import builtins
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hlora.cli import main as cli

OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "chmod")
KILLED = 87


@dataclass(frozen=True)
class Ended:
    """Of a command: its exit status, the file operations that it made, what it said, seconds."""

    status: int
    operations: int
    said: str
    seconds: float

    @property
    def traceback(self) -> bool:
        return "Traceback" in self.said


def run(argv: list[str], **how: Any) -> Ended:
    """`run_once`, and again where a forked torch finds no threads: no fault of a command."""
    ended = run_once(argv, **how)
    while "Invalid thread pool" in ended.said:
        ended = run_once(argv, **how)
    return ended


def run_once(
    argv: list[str], *, kill_at: int | None = None, kill_after: float | None = None,
    largest: int | None = None, before: Callable[[], Any] = lambda: None,
) -> Ended:  # fmt: skip
    """Run a command of hlora.

    Args:
        kill_at: it ends before its n-th file operation, as by `kill -9`.
        kill_after: it is killed after so many seconds.
        largest: bytes of a file at which its disk is full.
        before: called in the process first.
    """
    began = time.monotonic()
    told, tell = os.pipe()
    said, say = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        os.close(said)
        os.dup2(say, 1)
        os.dup2(say, 2)
        _child(argv, tell, kill_at, largest, before)
    os.close(tell)
    os.close(say)
    if kill_after is not None:
        _kill_after(child, kill_after)
    with os.fdopen(said, errors="replace") as pipe:
        text = pipe.read()
    with os.fdopen(told) as pipe:
        count = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, int(count or 0), text, time.monotonic() - began)


def _kill_after(child: int, seconds: float) -> None:
    """By another process, so that this one may read meanwhile."""
    if os.fork():
        return
    time.sleep(seconds)
    try:
        os.kill(child, signal.SIGKILL)
    finally:
        os._exit(0)


def _child(
    argv: list[str], tell: int, kill_at: int | None, largest: int | None, before: Callable[[], Any]
) -> None:
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **named: Any) -> Any:
            nonlocal done
            mode = named.get("mode", args[1] if len(args) > 1 else "")
            if function is not opened or set("wxa+") & set(str(mode)):
                if done == kill_at:
                    os._exit(KILLED)
                done += 1
            return function(*args, **named)

        return operation

    opened, status = builtins.open, 70
    try:
        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = counted(opened)
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            free = shutil.disk_usage(".")._replace(free=1 << 40)
            shutil.disk_usage = lambda path: free
        before()
        status = cli.main(argv)
    except BaseException:
        traceback.print_exc()
    os.write(tell, str(done).encode())
    os._exit(status)
