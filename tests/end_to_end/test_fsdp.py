"""FSDP2 on two processes does what one process does with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.fsdp_worker import CASES

ROOT = Path(__file__).parents[2]
FSDP2 = ["accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml",
         "--num_processes", "2"]  # fmt: skip


def run(folder, launcher):
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.end_to_end.fsdp_worker", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process wrote of all cases, and what two did: a launch each, as it takes long."""
    pytest.importorskip("accelerate", minversion="1.6")  # the first with FSDP2
    place = tmp_path_factory.mktemp("fsdp")
    return run(place / "one", ["torch.distributed.run", "--standalone"]), run(place / "two", FSDP2)


@pytest.mark.parametrize(("how", "kind"), [(how, kind) for how in CASES for kind in CASES[how]])
def test_two_processes_equal_one(both, how, kind):
    folders = [of / how / kind for of in both]
    for file in ("nu/importance.safetensors", "nu/adapter_model.safetensors",
                 "mu/adapter_model.safetensors"):  # fmt: skip
        one, two = (load_file(folder / file) for folder in folders)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-9)
    one, two = (json.loads((folder / "R.json").read_text()) for folder in folders)
    assert one[-1] > 0
    assert two == pytest.approx(one, rel=1e-5)
