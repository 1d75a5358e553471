"""A worker of the tests on several processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone"]


def launch(launcher: list[str], worker: str, folder: Path, *more: str) -> Path:
    """Run a worker of this folder, which writes to `folder`, under torchrun or accelerate."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", f"tests.end_to_end.{worker}", str(folder), *more],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
