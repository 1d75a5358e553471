"""Calls in processes of their own: results, errors, and a process that is killed."""

import os
import signal
import subprocess
import sys
import time
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


def naps(marker):
    Path(marker).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    parent, worker = parent_and_worker("naps", tmp_path)
    parent.kill()
    parent.wait()
    wait_until(lambda: ended(worker))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_second_stop_waits_for_no_worker(tmp_path):
    """The first lets the workers end by themselves, which these do not."""
    parent, worker = parent_and_worker("deaf", tmp_path)
    time.sleep(1)
    parent.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        parent.wait(2)
    parent.send_signal(signal.SIGINT)
    parent.wait(30)
    wait_until(lambda: ended(worker))


def parent_and_worker(function, folder):
    """A process whose two workers run a function of this file, and what /proc says of one."""
    marker = folder / "pid"
    script = (
        f"from tests.test_pool import {function} as call\nfrom hlora.study.pool import outcomes\n"
        f"if __name__ == '__main__':\n    list(outcomes([(call, {str(marker)!r})] * 2, 2))\n"
    )
    (folder / "parent.py").write_text(script)
    root = Path(__file__).parents[1]
    parent = subprocess.Popen(
        [sys.executable, str(folder / "parent.py")], stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)}, preexec_fn=heard,
    )  # fmt: skip
    wait_until(lambda: marker.exists() and marker.read_text())
    return parent, Path("/proc") / marker.read_text() / "stat"


def ended(worker):
    return not worker.exists() or worker.read_text().split()[2] == "Z"


def heard():
    """In a process of pytest-xdist Ctrl-C is ignored, and in its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def deaf(marker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    naps(marker)


def wait_until(holds, seconds=60):
    for _ in range(10 * seconds):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it took too long")
