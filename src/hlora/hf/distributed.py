"""Ways to train on several devices that the callbacks cannot follow."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed

from hlora.errors import UnsupportedModelError


def refuse_sharded(args: Any) -> None:
    """Refuse DeepSpeed and FSDP. Every rank must see whole pairs and their gradients.

    Under DeepSpeed the optimizer steps inside backward, so that there is no moment at which a
    callback sees the gradients and the old weights together.

    Raises:
        UnsupportedModelError: names the setting.
    """
    if getattr(args, "deepspeed", None):
        raise UnsupportedModelError(
            "TrainingArguments(deepspeed=...) is not supported: it steps inside backward. Train "
            "with DistributedDataParallel (torchrun without a DeepSpeed config)."
        )
    if getattr(args, "fsdp", None):
        raise UnsupportedModelError(
            "TrainingArguments(fsdp=...) is not supported: the LoRA matrices are sharded. Train "
            "with DistributedDataParallel."
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
        torch.distributed.destroy_process_group()
