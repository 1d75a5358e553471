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
FSDP2 = ["accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml",
         "--num_processes", "2"]  # fmt: skip


def run(folder, launcher, how, kinds):
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.end_to_end.fsdp_worker", str(folder), how,
         *kinds],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ("loop", ["dense", "factored", "blend"]),
        ("trainer", ["factored", "blend"]),
        ("experts", ["dense", "blend"]),
    ],
)
def test_two_processes_equal_one(tmp_path, how, kinds):
    pytest.importorskip("accelerate", minversion="1.6")  # the first with FSDP2
    run(tmp_path / "one", ["torch.distributed.run", "--standalone"], how, kinds)
    run(tmp_path / "two", FSDP2, how, kinds)
    for kind in kinds:
        for file in ("nu/importance.safetensors", "nu/adapter_model.safetensors",
                     "mu/adapter_model.safetensors"):  # fmt: skip
            one, two = (load_file(tmp_path / of / kind / file) for of in ("one", "two"))
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-9)
        one, two = (
            json.loads((tmp_path / of / kind / "R.json").read_text()) for of in ("one", "two")
        )
        assert one[-1] > 0
        assert two == pytest.approx(one, rel=1e-5)
