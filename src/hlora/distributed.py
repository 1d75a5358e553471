"""Ways to train on several devices that the callbacks cannot follow."""

from __future__ import annotations

from typing import Any

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
