"""FSDP2 on two processes does what one process does with the whole batch."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.fsdp_worker import CASES
from tests.end_to_end.launch import TORCHRUN, launch

FSDP2 = ["accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml",
         "--num_processes", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process wrote of all cases, and what two did: a launch each, as it takes long."""
    pytest.importorskip("accelerate", minversion="1.6")  # the first with FSDP2
    place = tmp_path_factory.mktemp("fsdp")
    launchers = (("one", TORCHRUN), ("two", FSDP2))
    return [launch(launcher, "fsdp_worker", place / name) for name, launcher in launchers]


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
