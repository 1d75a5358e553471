"""Several processes: who writes, and the ways to train that the callbacks cannot follow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed
from torch import Tensor

from hlora.core.sharded import is_sharded
from hlora.errors import UnsupportedModelError

_WHY = {
    "DEEPSPEED": "DeepSpeed is not supported: it takes the optimizer's step inside backward",
    "FSDP": "FSDP1 is not supported: it makes one flat parameter of the LoRA matrices",
    "MEGATRON_LM": "Megatron-LM is not supported: it shards the LoRA matrices",
}


def refuse_shards(what: str, parameters: Iterable[Tensor] = ()) -> None:
    """Refuse FSDP in any form that is in force, for the sake of `what`.

    Args:
        parameters: which a loop of one's own may have sharded.

    Raises:
        UnsupportedModelError: the model is or will be sharded.
    """
    if _plan() == "FSDP" or any(map(is_sharded, parameters)):
        raise UnsupportedModelError(
            f"{what} does not work where the model is sharded (FSDP2): leave it out, or train with "
            "DistributedDataParallel: torchrun, without that setting."
        )


def _plan() -> str | None:
    """What accelerate has in force."""
    from accelerate.state import AcceleratorState

    return getattr(AcceleratorState._shared_state.get("distributed_type"), "name", None)


def refuse_plan(args: Any = None, *, fsdp2: bool = True) -> None:
    """Refuse ways to train on several processes that the callbacks cannot follow.

    What accelerate has in force is looked at: `accelerate launch` chooses it by its environment,
    without an argument, and on a CPU it never shards, whatever the arguments say.

    Args:
        args: TrainingArguments, of which DeepSpeed's are in force as they are.
        fsdp2: whether the caller can train with it.

    Raises:
        UnsupportedModelError: names the plan, and what to use instead.
    """
    from accelerate.state import AcceleratorState

    in_force = AcceleratorState._shared_state
    plan = _plan()
    where = "accelerate's configuration"
    if getattr(args, "deepspeed", None):
        plan, where = "DEEPSPEED", "TrainingArguments(deepspeed=...)"
    if not fsdp2 and (plan == "FSDP" or getattr(args, "fsdp", None)):
        raise UnsupportedModelError(
            "The commands do not shard the model (fsdp): train in a script of your own, with "
            "hlora.attach, or with DistributedDataParallel: torchrun, without that setting."
        )
    if plan == "FSDP" and getattr(in_force.get("fsdp_plugin"), "fsdp_version", 1) == 2:
        return
    if plan in _WHY:
        raise UnsupportedModelError(
            f"{_WHY[plan]} (chosen by {where}). Shard with FSDP2 (fsdp_version: 2), or train with "
            "DistributedDataParallel: torchrun, without that setting."
        )


def is_main() -> bool:
    """Whether this process is the one that prints and writes, rank 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # torchrun's


def weights_to_come() -> bool:
    """Whether only rank 0 has read the base model, and sends the others their parts later."""
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return not is_main() and all(os.environ.get(f, "").lower() in ("1", "true") for f in flags)


def wait_for_all() -> None:
    """Until every process is here: what rank 0 has written is there for all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_together() -> None:
    """End the process group, at the end of a program: the threads of a process whose peer has
    already gone can abort it.
    """
    wait_for_all()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Gloo's thread lets go of the barrier meanwhile. It needs the interpreter for that, and the
        # group's end, which holds it, waits for the thread: together they wait for ever.
        time.sleep(0.5)
        torch.distributed.destroy_process_group()
