"""Two processes with half the batch each do what one does with the whole batch."""

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.ddp_worker import KINDS
from tests.end_to_end.launch import TORCHRUN, launch
from tests.test_budget import WATCHED, gathered


def run(folder, batch, processes):
    gathered(folder / "looks" / "base", WATCHED, WATCHED)
    launcher = [*TORCHRUN, "--nproc_per_node", str(processes)]
    return launch(launcher, "ddp_worker", folder, str(batch))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process wrote of all kinds, and what two did: a launch each, as it takes long."""
    place = tmp_path_factory.mktemp("ddp")
    return run(place / "one", 8, 1), run(place / "two", 4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(both, kind):
    recorded = ["nu/importance.safetensors", "nu/adapter_model.safetensors"]
    for file in (*(recorded if kind != "looks" else ()), "mu/adapter_model.safetensors"):
        one, two = (load_file(of / kind / file) for of in both)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-7)
