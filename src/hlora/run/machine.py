"""What a result was measured with: versions, the machine, peak memory."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from hlora.core import card


@lru_cache
def versions() -> dict[str, str | None]:
    """Of hlora (and its commit, in a checkout), Python and the libraries that train."""
    return {"commit": _commit(), **card.versions()}


def _commit() -> str | None:
    """The checkout that this code runs from; `+` after it if files differ from the commit."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10
        )
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", __file__):  # another repository
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, Any]:
    """The device that trains, and how many threads the CPU gives to it."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {"device": name, "threads": torch.get_num_threads(), "system": platform.system()}


@lru_cache
def processor() -> str:
    """The CPU's name."""
    found = _told_by_linux("/proc/cpuinfo", "model name")
    return found or platform.processor() or platform.machine()


def _told_by_linux(path: str, key: str) -> str:
    """The first value of a key in a file of /proc; empty on other systems."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def reset_peak() -> None:
    """Restart the count of peak memory, on the GPU or (Linux) of this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(*, gpu: bool | None = None) -> int | None:
    """Most memory since `reset_peak`: allocated on the GPU, or resident in this process.

    `gpu` says which; None takes the GPU where there is one.
    """
    import torch

    if torch.cuda.is_available() if gpu is None else gpu:
        return torch.cuda.max_memory_allocated()
    if most := _told_by_linux("/proc/self/status", "VmHWM"):
        return int(most.split()[0]) * 1024
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if platform.system() == "Darwin" else 1024)
    return None
