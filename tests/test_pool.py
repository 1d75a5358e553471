"""Calls in processes of their own: results, errors, and a process that is killed."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from hlora.study.pool import outcomes


def double(x):
    return 2 * x


def fails():
    raise ValueError("no")


def killed(marker=None):
    """As the kernel does when memory is short; with a marker, the first time only."""
    if marker and Path(marker).exists():
        return "alive"
    if marker:
        Path(marker).touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return None


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_and_errors_come_with_their_index(jobs):
    found = dict(outcomes([(double, 1), (fails,), (double, 3)], jobs))
    assert (found[0], found[2]) == (2, 6)
    assert isinstance(found[1], ValueError)


def test_a_killed_process_takes_nothing_else_with_it(tmp_path):
    calls = [(double, 1), (killed,), (double, 2), (killed, str(tmp_path / "once")), (double, 3)]
    found = dict(outcomes(calls, 2))
    assert len(found) == len(calls)
    assert (found[0], found[2], found[3], found[4]) == (2, 4, "alive", 6)
    assert isinstance(found[1], BrokenProcessPool)
