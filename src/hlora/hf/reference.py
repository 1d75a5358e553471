"""The reference of preference training: where the policy starts, not the base model.

A new adapter is moved to θ^ν when training begins. TRL's reference is the model with its adapter
disabled, which is θ₀, or an adapter named `ref`, which can hold θ^ν.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hlora.core.adapter_file import read_tensors
from hlora.core.sharded import is_sharded
from hlora.errors import UnsupportedModelError
from hlora.hf.peft import adapter_config, add_reference, take_over
from hlora.hf.regularize import Penalty

logger = logging.getLogger(__name__)

REF = "ref"
"""TRL's name of the adapter that is the reference."""

_PRECOMPUTED = {"ref_chosen_logps", "ref_logps"}
_MENDED = ("GRPOTrainer", "RLOOTrainer")
"""Their reference can be an adapter since TRL 0.27."""
_LINE = "PeftModel.from_pretrained(model, {folder!r}, is_trainable=True), without a peft_config"


def refer_to_start(trainer: Any, penalty: Penalty) -> None:
    """Have a trainer that compares with a reference compare with where the penalty's ν ended.

    Without effect for a trainer that has none, or where training starts at the base model.

    Raises:
        UnsupportedModelError: its reference can only be the base model.
    """
    teacher = getattr(trainer.args, "teacher_model_kind", "live")  # SDFT and SDPO have no reference
    compares = hasattr(trainer, "ref_model") and getattr(trainer, "beta", None) != 0
    if teacher == "live" and not compares:
        return
    start = penalty.start_of(trainer.model)
    if start == "elsewhere":
        return
    name, folder = type(trainer).__name__, str(penalty.stored.folder)
    or_base = f"hold to the base model with hlora.Penalty({folder!r}, anchor='base')."
    if teacher != "live":
        raise UnsupportedModelError(
            f"The teacher of this {name} begins as the base model, while training starts at the "
            f"adapter in {folder}: set teacher_model_kind='live', or {or_base}"
        )
    recorded, noted = read_tensors(penalty.stored.folder), penalty.stored.info["pairs"]
    if trainer.ref_model is not None:
        given = "ref_model" in inspect.signature(type(trainer).__init__).parameters
        if given:
            logger.warning(
                "The reference is the ref_model that was given, while training starts at the "
                "adapter in %s: without ref_model the reference is that start.", folder,
            )  # fmt: skip
        elif start == "new":  # A2PO's is a copy of the model, new adapter and all
            take_over(trainer.ref_model, recorded, noted)
        return
    columns = set(getattr(trainer.train_dataset, "column_names", None) or ())
    if start == "new" and columns & _PRECOMPUTED:
        raise UnsupportedModelError(
            f"{name} has precomputed its reference at the base model, and training starts at the "
            f"adapter in {folder}: set precompute_ref_log_probs=False, or give it model="
            + _LINE.format(folder=folder)
        )
    if any(map(is_sharded, trainer.model.parameters())):
        raise UnsupportedModelError(
            f"The model of this {name} is already sharded, and its reference, the adapter in "
            f"{folder}, has to be added to it whole: let the Trainer shard it (fsdp_version: 2), "
            "which it does after attach."
        )
    if hasattr(trainer, "ref_adapter_name"):  # DPO and KTO of older versions
        trainer.ref_adapter_name = REF
        trainer.model_adapter_name = adapter_config(trainer.model)[0]
    elif not _looks_for_ref(trainer):
        upgrade = "upgrade with pip install -U 'trl>=0.27', or " if name in _MENDED else ""
        raise UnsupportedModelError(
            f"The reference of this {name} is the base model, while training starts at the "
            f"adapter in {folder}: {upgrade}{or_base}"
        )
    add_reference(trainer.model, REF, recorded, noted)
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(c, _Unsaved) for c in callbacks):
        callbacks.append(_Unsaved())


class _Unsaved(TrainerCallback):
    """Takes the reference out of a checkpoint: `attach` makes it anew.

    Transformers before 5 resumes the adapters in folders of their own alone, not the trained one.
    """

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            shutil.rmtree(checkpoint / REF, ignore_errors=True)


def _looks_for_ref(trainer: Any) -> bool:
    """Whether an adapter named `ref` is its reference, as in TRL since 0.27.

    Not so where a class on top of GRPO's disables the adapter itself.
    """
    for of in type(trainer).__mro__:
        module = sys.modules[of.__module__]
        source = inspect.getsource(module) if module.__name__.startswith("trl.") else ""
        if '"ref" in' in source or ".disable_adapter()" in source:
            return '"ref" in' in source
    return False
