"""A run of transformers' Trainer from our settings: arguments, checkpoints, resuming."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hlora.core.regularizer import Regularizer
from hlora.errors import InputError, StoreError, suggest
from hlora.files import write_json
from hlora.hf.attach import attach
from hlora.hf.distributed import is_main, refuse_sharded, wait_for_all
from hlora.run.models import pick_device, pick_dtype
from hlora.run.progress import Interruptible, Progress
from hlora.run.settings import TrainSettings

OURS = {
    "output_dir": "--output",
    "num_train_epochs": "--epochs",
    "max_steps": "--max-steps",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "learning_rate": "--learning-rate",
    "seed": "--seed",
    "save_steps": "--save-steps",
    "logging_steps": "--logging-steps",
    "resume_from_checkpoint": "--resume",
    "bf16": "--dtype bf16",
    "fp16": "--dtype fp16",
    "use_cpu": "--device cpu",
}
"""Fields of TrainingArguments that have a flag of their own."""

_MAY_DIFFER = ("resume", "overwrite", "dry_run", "save_steps", "logging_steps", "device")


@dataclass(frozen=True)
class Trained:
    """A finished run: its log entries, seconds and optimizer steps.

    With a budget of forgetting also what was predicted of it and measured, in nats per token, and
    the share of the change that was kept for it.
    """

    log: list[dict[str, Any]]
    seconds: float
    steps: int
    forgetting: dict[str, float] | None = None


def arguments(settings: TrainSettings) -> TrainingArguments:
    """TrainingArguments from settings, those under `training` included.

    Raises:
        InputError: an unknown field, or one that has a flag of its own.
    """
    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in settings.training:
        if name in OURS:
            raise InputError(f"--training.{name} has its own flag here: {OURS[name]}.")
        if name not in known:
            raise InputError(
                f"TrainingArguments has no field {name!r}" + suggest(name, known, ".", 0.5)
            )
    refuse_sharded(SimpleNamespace(**settings.training))
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    values = {
        "output_dir": str(work_folder(settings)),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": 2,
        "logging_steps": settings.logging_steps,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.startswith("cuda"),
        "ddp_find_unused_parameters": False,
        "use_cpu": device == "cpu",
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16" and device != "cpu",
        **settings.training,
    }
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise InputError(f"TrainingArguments refuses these settings: {_one_line(error)}") from None
    args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU; torchrun for several
    return args


def train(
    settings: TrainSettings,
    model: nn.Module,
    data: Any,
    parts: Sequence[TrainerCallback | Regularizer],
    *,
    what: str,
    collate: Callable | None = None,
    state: str | None = None,
    resume_with: str = "",
) -> Trained:
    """Train, from the last checkpoint if the settings say so.

    Args:
        parts: recordings and regularizers, see `hlora.attach`.
        what: the label of the progress bar.
        state: the file that the callbacks add to a checkpoint; one without it is not whole.
        resume_with: the advice after Ctrl-C.
    """
    work = work_folder(settings)
    args = arguments(settings)
    checkpoint = last_checkpoint(work, state) if settings.resume else None
    if checkpoint is not None:
        args.resume_from_checkpoint = str(checkpoint)
    if is_main():  # for the check at a resume
        write_json(work / "settings.json", asdict(settings))
    if args.gradient_checkpointing:  # else a frozen base has no path for gradients
        model.enable_input_require_grads()  # type: ignore[operator]
    stop = Interruptible(resume_with or "Continue with --resume.")
    try:
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"Trainer refuses these settings: {_one_line(error)}") from None
    attach(trainer, *parts)
    for default in list(trainer.callback_handler.callbacks):
        if type(default).__name__ == "PrinterCallback":
            trainer.remove_callback(default)
    trainer.add_callback(Progress(what))
    trainer.add_callback(stop)
    began = time.monotonic()
    with stop.listening():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                str(interrupt) or "Stopped before the first checkpoint: nothing was kept."
            ) from None
    log = [e for e in trainer.state.log_history if "loss" in e]
    return Trained(log, time.monotonic() - began, trainer.state.global_step)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


def work_folder(settings: TrainSettings) -> Path:
    """Where the checkpoints of an unfinished run lie."""
    return Path(settings.output) / "checkpoints"


def last_checkpoint(work: Path, state: str | None) -> Path | None:
    """The newest checkpoint that is whole; None if there is none yet."""
    found = [
        p
        for p in work.glob("checkpoint-*")
        if p.name.split("-")[1].isdigit()
        and (p / "trainer_state.json").is_file()
        and (p / "adapter_model.safetensors").is_file()
        and (state is None or (p / state).is_file())
    ]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def check_unfinished(settings: TrainSettings) -> None:
    """Deal with what an interrupted run left in the output folder.

    Raises:
        InputError: there are checkpoints and neither --resume nor --overwrite says what to do;
            or the run to be resumed had other settings.
    """
    work = work_folder(settings)
    if not any(work.glob("checkpoint-*")):
        return
    if settings.overwrite and not settings.resume:
        shutil.rmtree(work)
        return
    if not settings.resume:
        raise InputError(
            f"{work} holds checkpoints of an unfinished run: go on with --resume, or start again "
            "with --overwrite."
        )
    try:
        before = json.loads((work / "settings.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise StoreError(f"{work / 'settings.json'} is missing or damaged: start again.") from None
    now = asdict(settings)
    for key, value in now.items():
        was = before.get(key, value)
        if key == "anchor" and {was, value} == {None, "nu"}:  # not given is nu
            continue
        if key not in _MAY_DIFFER and was != value:
            raise InputError(
                f"Cannot resume: --{key.replace('_', '-')} was {was} and is {value} now."
            )


def clean_up(settings: TrainSettings) -> None:
    """The result is complete: its checkpoints are no longer needed."""
    wait_for_all()
    if is_main():
        shutil.rmtree(work_folder(settings), ignore_errors=True)
