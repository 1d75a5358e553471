"""Calls in processes of their own, that survive the death of one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Call = tuple[Any, ...]
"""A function and its arguments."""


def outcomes(
    calls: Sequence[Call], jobs: int, prepare: Callable[[], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """(index, result) of each call as it ends; the exception instead of a result if it raised.

    A process that is killed (the kernel does so when memory is short) ends its own call only, which
    is tried again, alone, after the others: BrokenProcessPool stands for one that kills its process
    again.
    """
    if jobs == 1:
        for index, call in enumerate(calls):
            yield index, _tried(*call)
        return

    def in_its_own(call: Call) -> Any:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, _start, (jobs, prepare)) as process:
            return process.submit(*call).result()

    threads = ThreadPoolExecutor(jobs)
    try:
        running = {threads.submit(in_its_own, call): i for i, call in enumerate(calls)}
        broken: list[int] = []
        for done in as_completed(running):
            if isinstance(done.exception(), BrokenProcessPool):
                broken.append(running[done])
            else:
                yield running[done], _tried(done.result)
        for index in broken:
            yield index, _tried(threads.submit(in_its_own, calls[index]).result)
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        _end_all()
        raise
    threads.shutdown()


def _end_all() -> None:
    """The workers save what they train and end; a second Ctrl-C does not wait for that."""
    try:
        while running := multiprocessing.active_children():
            for process in running:
                process.terminate()
            for process in running:
                process.join()
    finally:
        for process in multiprocessing.active_children():
            process.kill()


def _tried(call: Callable[..., Any], *args: Any) -> Any:
    """The result, or the exception that came in its place."""
    try:
        return call(*args)
    except Exception as error:
        return error


def _start(jobs: int, prepare: Callable[[], None] | None) -> None:
    """A worker leaves Ctrl-C to the parent, ends with it, and shares the cores with the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    if prepare is not None:
        prepare()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
