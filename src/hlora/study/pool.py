"""Calls in processes of their own, that survive the death of one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Call = tuple[Any, ...]
"""A function and its arguments."""


def outcomes(
    calls: Sequence[Call], jobs: int, prepare: Callable[[], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """(index, result) of each call as it ends; the exception instead of a result if it raised.

    A process that is killed (the kernel does so when memory is short) takes the pool with it. The
    calls that then ran are tried again, one at a time: BrokenProcessPool stands for one that kills
    its process again.
    """
    if jobs == 1:
        for index, call in enumerate(calls):
            try:
                yield index, call[0](*call[1:])
            except Exception as error:
                yield index, error
        return
    waiting = deque(range(len(calls)))
    while waiting:
        broken: list[int] = []
        for index, result in _until_broken(calls, waiting, jobs, prepare):
            if isinstance(result, BrokenProcessPool):
                broken.append(index)
            else:
                yield index, result
        for index in broken:
            yield from _until_broken(calls, deque([index]), 1, prepare, of=jobs)


def _until_broken(
    calls: Sequence[Call],
    waiting: deque[int],
    jobs: int,
    prepare: Callable[[], None] | None,
    of: int = 0,
) -> Iterator[tuple[int, Any]]:
    running: dict[Future, int] = {}
    whole = True
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _start, (of or jobs, prepare)
    )
    try:
        while running or (waiting and whole):
            # No more than there are processes: what is in a pool when it breaks is lost.
            while whole and waiting and len(running) < jobs:
                index = waiting.popleft()
                running[pool.submit(*calls[index])] = index
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                whole = whole and not isinstance(error, BrokenProcessPool)
                yield running.pop(future), error or future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


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
