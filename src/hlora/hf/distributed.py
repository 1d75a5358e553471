"""Several processes: who writes, and the ways to train that the callbacks cannot follow."""

from __future__ import annotations

import os
import time
from typing import Any

import torch.distributed

from hlora.errors import UnsupportedModelError

_WHY = {
    "DEEPSPEED": "DeepSpeed is not supported: it takes the optimizer's step inside backward",
    "FSDP": "FSDP is not supported: it shards the LoRA matrices",
    "MEGATRON_LM": "Megatron-LM is not supported: it shards the LoRA matrices",
}


def refuse_sharded(args: Any = None) -> None:
    """Refuse DeepSpeed and FSDP. Every process must see whole pairs and their gradients.

    Both what TrainingArguments ask for and what accelerate has in force are looked at:
    `accelerate launch` chooses them by its environment, without an argument.

    Raises:
        UnsupportedModelError: names the plan, and what to use instead.
    """
    for field, plan in (("deepspeed", "DEEPSPEED"), ("fsdp", "FSDP")):
        if getattr(args, field, None):
            _refuse(f"TrainingArguments({field}=...)", plan)
    from accelerate.state import AcceleratorState

    kind = AcceleratorState._shared_state.get("distributed_type")
    if kind is not None and kind.name in _WHY:
        _refuse("accelerate's configuration", kind.name)


def _refuse(where: str, plan: str) -> None:
    raise UnsupportedModelError(
        f"{_WHY[plan]} (chosen by {where}). Train with DistributedDataParallel: torchrun, without "
        "that setting."
    )


def is_main() -> bool:
    """Whether this process is the one that prints and writes (torchrun's rank 0)."""
    return os.environ.get("RANK", "0") == "0"


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
