"""FSDP2 on two processes does what one process does with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def run(folder, processes, how):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(processes), "-m", "tests.end_to_end.fsdp_worker", str(folder), how],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("how", ["loop", "trainer"])
def test_two_processes_equal_one(tmp_path, how):
    run(tmp_path / "one", 1, how)
    run(tmp_path / "two", 2, how)
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").glob("*/*/*.safetensors")]
    assert len(files) == 9  # importance, recorded adapter and tuned adapter, of three kinds
    for file in files:
        one, two = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-9)
    for file in (tmp_path / "one").glob("*/R.json"):
        one = json.loads(file.read_text())
        two = json.loads((tmp_path / "two" / file.relative_to(tmp_path / "one")).read_text())
        assert one == pytest.approx(two, rel=1e-5)
        assert min(map(min, one) if isinstance(one[0], list) else one) > 0
