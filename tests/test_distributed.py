"""Several processes: what is refused, and which configurations are there for accelerate."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import hlora
from hlora.core.sharded import local, placed, whole
from hlora.core.steps import steps_of
from hlora.hf.distributed import refuse_plan
from hlora.hf.peft import base_of, find_pairs
from tests.conftest import lora_model, make_trainer

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def in_force(monkeypatch, plan, **plugin):
    state = AcceleratorState._shared_state
    monkeypatch.setitem(state, "distributed_type", DistributedType(plan))
    monkeypatch.setitem(state, "fsdp_plugin", SimpleNamespace(**plugin) if plugin else None)


@pytest.mark.parametrize("plan", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_plan_that_accelerate_chose_is_refused(tmp_path, nu, plan, monkeypatch):
    trainer = make_trainer(lora_model(), tmp_path)
    in_force(monkeypatch, plan, fsdp_version=1)
    with pytest.raises(hlora.UnsupportedModelError, match=f"(?i){plan[:8]}.*FSDP2"):
        hlora.attach(trainer, hlora.Penalty(nu))


def test_deepspeed_in_the_arguments_is_refused():
    with pytest.raises(hlora.UnsupportedModelError, match="DeepSpeed"):
        refuse_plan(SimpleNamespace(deepspeed="zero3.json"))


def test_what_is_not_in_force_is_not_refused(monkeypatch):
    """On a CPU accelerate trains with DDP where TrainingArguments ask for FSDP."""
    in_force(monkeypatch, "MULTI_CPU")
    refuse_plan(SimpleNamespace(fsdp="full_shard", deepspeed=None))


def test_fsdp2_is_for_trainers_and_not_for_the_commands(tmp_path, nu, monkeypatch):
    trainer = make_trainer(lora_model(), tmp_path)
    in_force(monkeypatch, "FSDP", fsdp_version=2)
    hlora.attach(trainer, hlora.Penalty(nu))
    with pytest.raises(hlora.UnsupportedModelError, match="commands do not shard"):
        refuse_plan(fsdp2=False)


def test_weights_that_are_yet_to_be_sent_are_not_compared(monkeypatch):
    model = lora_model()
    pairs = find_pairs(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    assert base_of(model, pairs)["samples"]
    monkeypatch.setenv("RANK", "1")
    assert not base_of(model, pairs)["samples"]
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    assert base_of(model, pairs)["samples"]


def test_a_process_that_holds_nothing_still_answers_the_others(monkeypatch):
    """As where A alone is trained and there are more processes than ranks."""
    asked = []
    monkeypatch.setattr("hlora.core.steps.anywhere", lambda flag: asked.append(bool(flag)) or flag)
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    optimizer = torch.optim.SGD([empty], lr=0.1)
    steps = steps_of(optimizer)
    optimizer.step()
    assert asked == [False]
    assert (steps.seen, steps.bad) == (1, 0)


def test_a_whole_matrix_is_its_own_part():
    matrix = torch.randn(3, 2)
    assert whole(matrix) is local(matrix) is placed(matrix, torch.zeros(3, 2)) is matrix


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_configurations(name):
    """That of FSDP2 is also what test_fsdp.py trains with."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    assert config.fsdp_config.get("fsdp_version") == {"ddp": None, "fsdp2": 2}[name]
    assert {p.stem for p in CONFIGS.iterdir()} == {"ddp", "fsdp2"}
