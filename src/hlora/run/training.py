"""A run of transformers' Trainer from our settings: arguments, checkpoints, resuming."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hlora.core import store
from hlora.core.regularizer import Regularizer
from hlora.data.rows import Rows
from hlora.errors import InputError, StoreError, one_line, suggest
from hlora.files import fault, refuse_result, write_json
from hlora.hf.attach import attach
from hlora.hf.badsteps import BadSteps
from hlora.hf.checkpoints import newest_whole
from hlora.hf.distributed import is_main, refuse_plan, wait_for_all
from hlora.hf.hub import located
from hlora.run.models import pick_device, pick_dtype
from hlora.run.outputs import NOTHING, whole
from hlora.run.progress import Interruptible, Progress, bar
from hlora.run.schedule import ResumedRate
from hlora.run.settings import OF_EACH, TrainSettings, listed
from hlora.run.trainer import make_trainer

logger = logging.getLogger(__name__)

NOTES = "settings.json"
"""Beside the checkpoints: which run they are of."""
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
    "push_to_hub": "--push-to-hub",
}
"""Fields of TrainingArguments that have a flag of their own."""
_EVALUATING = ("do_eval", "eval_on_start", "eval_strategy", "load_best_model_at_end")

_MAY_DIFFER = (
    "resume", "overwrite", "dry_run", "save_steps", "logging_steps", "device", "max_bad_steps",
    "output", "push_to_hub", "public", "keep_checkpoint",
)  # fmt: skip
_BY_CONTENT = ("model", "importance", "text", "text_column", "task", "replay", "kl", "corda")
"""What is read may have moved: its content is compared."""


@dataclass(frozen=True)
class Trained:
    """A finished run: its log entries, seconds and optimizer steps.

    With a budget of forgetting also what was predicted of it and measured, in nats per token, and
    the share of the change that was kept for it; None for what is no finite number.
    """

    log: list[dict[str, Any]]
    seconds: float
    steps: int
    forgetting: dict[str, float | None] | None = None


def read_trained(path: Path) -> Trained:
    """What the marker of a finished run says of it.

    Raises:
        StoreError: it is damaged.
    """
    noted = _noted(path)
    log: Any = noted.get("log")
    seconds: Any = noted.get("seconds")
    steps: Any = noted.get("steps")
    lost: Any = noted.get("forgetting")
    numbers = [seconds, steps]
    try:
        numbers += [v for entry in log for v in entry.values()]
        numbers += [lost[k] for k in _LOST if lost[k] is not None] if lost is not None else []
    except (TypeError, AttributeError, KeyError):
        numbers = [None]
    if not all(isinstance(n, (int, float)) for n in numbers):
        raise StoreError(f"{path} is damaged: train again, with --overwrite.")
    return Trained(log, seconds, int(steps), lost)


@contextmanager
def _precision(bf16: bool, fp16: bool) -> Iterator[None]:
    """What --dtype says is how accelerate computes; it would take that of a Trainer before ours."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    os.environ[name] = "bf16" if bf16 else "fp16" if fp16 else "no"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def arguments(settings: TrainSettings) -> TrainingArguments:
    """TrainingArguments from settings, those under `training` included.

    Raises:
        InputError: an unknown field, or one that has a flag of its own.
    """
    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in settings.training:
        if name in OURS:
            raise InputError(f"--training.{name} has its own flag here: {OURS[name]}.")
        if name in _EVALUATING and settings.training[name] not in (False, "no", None):
            raise InputError(
                f"--training.{name} needs data to evaluate on while training, of which there is "
                "none here: leave it out, and use `hlora eval` afterwards."
            )
        if name not in known:
            raise InputError(
                f"TrainingArguments has no field {name!r}" + suggest(name, known, ".", 0.5)
            )
    refuse_plan(SimpleNamespace(**settings.training), fsdp2=False)
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
        with _precision(values["bf16"], values["fp16"]):
            args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise InputError(
            f"TrainingArguments refuses these settings: {one_line(error, 240)}"
        ) from None
    args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU; torchrun for several
    return args


def train(
    settings: TrainSettings,
    model: nn.Module,
    data: Any,
    parts: Sequence[TrainerCallback | Regularizer],
    *,
    what: str,
    run: dict[str, Any],
    collate: Callable | None = None,
    stop: Interruptible,
) -> Trained:
    """Train, from the last whole checkpoint if the settings say so.

    Args:
        parts: recordings and regularizers, see `hlora.attach`.
        what: the label of the progress bar.
        run: from `begin_run`.
        stop: what Ctrl-C does. Where it was asked for after the last step, `stop.asked` says so.
    """
    work = work_folder(settings)
    args = arguments(settings)
    with _precision(args.bf16, args.fp16):
        trainer = make_trainer(model, args, data, collate)
    checkpoint = newest_whole(work) if settings.resume else None
    if checkpoint is not None:
        logger.warning("Resuming from %s.", checkpoint)
    if args.gradient_checkpointing:  # else a frozen base has no path for gradients
        model.enable_input_require_grads()  # type: ignore[operator]
    refuse_plan(fsdp2=False)
    attach(trainer, *parts, BadSteps(settings.max_bad_steps), unheld=settings.unheld)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(what))
    trainer.add_callback(stop)
    trainer.add_callback(ResumedRate())
    if isinstance(data, Rows) and len(data.made) < len(data):  # what is wrong is said now
        tokenize(data, _drawn(trainer, settings.max_steps * settings.gradient_accumulation))
    if is_main():
        make_way(settings)
        write_json(work / NOTES, run)
    began = time.monotonic()
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked and stop.at_end:
        raise KeyboardInterrupt
    log = [e for e in trainer.state.log_history if math.isfinite(e.get("loss", math.nan))]
    log = [
        {k: v for k, v in e.items() if not isinstance(v, float) or math.isfinite(v)} for e in log
    ]
    return Trained(log, time.monotonic() - began, trainer.state.global_step)


def rows_needed(settings: TrainSettings) -> int | None:
    """Rows that --max-steps reads, on all processes; None trains for --epochs."""
    per_step = settings.batch_size * settings.gradient_accumulation
    return settings.max_steps * per_step * int(os.environ.get("WORLD_SIZE", 1)) or None


def text_rows(settings: TrainSettings) -> int | None:
    """Rows of text that a recording needs at most; a lengthened one goes over the same again."""
    noted = _noted(work_folder(settings) / NOTES) if settings.resume else {}
    return noted.get("text_rows", rows_needed(settings))


def tokenize(rows: Rows, which: Iterable[int]) -> None:
    """Make rows that are not made yet, under a progress bar."""
    which = list(which)
    with bar("tokenizing", len(which)) as shown:
        for index in which:
            rows[index]
            shown.update()


def _drawn(trainer: Trainer, batches: int) -> list[int]:
    """The rows of the first batches, by a sampler like the one that Trainer will use.

    Should it draw others, they are made when they are read.
    """
    with torch.random.fork_rng(devices=[]):
        sampler = trainer.get_train_dataloader().batch_sampler
        return [i for batch in itertools.islice(sampler, batches) for i in batch]


def work_folder(settings: TrainSettings) -> Path:
    """Where the checkpoints of an unfinished run lie."""
    return Path(settings.output) / "checkpoints"


def check_unfinished(settings: TrainSettings, marker: str) -> bool:
    """Look at what an interrupted run left in the output folder; whether it had finished.

    Nothing of it is touched: the new run may yet be refused, or only be planned.

    Raises:
        InputError: the folder holds a result, or checkpoints and neither --resume nor --overwrite
            says what to do; or the run to be resumed had other settings.
    """
    output, work = Path(settings.output), work_folder(settings)
    refuse_result(output, overwrite=True)
    before = _noted(work / NOTES)
    result = _noted(output / marker)
    of_one = result.get("run") and before.get("run", result["run"]) == result["run"]
    goes_on = False
    if of_one and settings.resume and not settings.overwrite:
        changed = _changed(settings, result)
        if not changed:
            return True
        goes_on = all(_is_longer(k, *both) for k, both in changed.items())
        if goes_on and newest_whole(work) is None:
            raise InputError(
                f"The run in {output} is finished and its checkpoints are gone, so that it cannot "
                "be lengthened (--keep-checkpoint would have kept one): start again with "
                "--overwrite."
            )
    if not goes_on:
        refuse_result(output, settings.overwrite)
    if not any(work.glob("checkpoint-*")):
        return False
    if not settings.resume:
        if settings.overwrite or newest_whole(work) is None:
            return False
        raise InputError(
            f"{work} holds checkpoints of an unfinished run: go on with --resume, or start again "
            "with --overwrite."
        )
    if not isinstance(before.get("settings"), dict):
        raise StoreError(f"{work / NOTES} is missing or damaged: start again with --overwrite.")
    for key, (was, value) in _changed(settings, before).items():
        if _is_longer(key, was, value):
            logger.warning(
                "The run is extended to --%s %g from %g. From here on its learning rate follows "
                "the schedule of a run of that length.", key.replace("_", "-"), value, was,
            )  # fmt: skip
        elif key not in _BY_CONTENT or None in (was, value):
            raise InputError(
                f"Cannot resume: --{key.replace('_', '-')} was {was} and is {value} now."
            )
    return False


def _is_longer(key: str, was: Any, now: Any) -> bool:
    """Whether a setting makes a run longer that had this one before."""
    return key in ("max_steps", "epochs") and isinstance(was, (int, float)) and 0 < was < now


def _changed(settings: TrainSettings, noted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from those noted, as (before, now) by name."""
    before, now = noted.get("settings"), asdict(settings)
    if not isinstance(before, dict):
        return {k: (None, v) for k, v in now.items()}
    if "anchor" in now:  # not given is nu; one value may stand for a list
        before, now = (
            {
                **d,
                **{k: listed(d.get(k)) for k in OF_EACH},
                "anchor": listed(d.get("anchor")) or ["nu"],
            }
            for d in (before, now)
        )
    return {
        k: (before[k], v) for k, v in now.items() if k not in _MAY_DIFFER and before.get(k, v) != v
    }


def begin_run(
    settings: TrainSettings, base: dict[str, Any], rows: Rows, also: Sequence[Tensor]
) -> dict[str, Any]:
    """What identifies a run: an id, its settings, and fingerprints of what it reads.

    Args:
        base: from `hlora.hf.peft.base_of`.
        rows: what is trained on.
        also: other tokens that are read.

    Raises:
        InputError: the run to be resumed read something else.
    """
    held_to = [located(nu) for nu in listed(getattr(settings, "importance", None))]
    content = {
        "base model": _digest([base["config"], base["samples"]]),
        "importance": ",".join(_digest(store.read_info(nu)["files"]) for nu in held_to) or None,
        "data": _digest(rows.content()),
        "general text": _digest([t.tolist() for t in also]),
    }
    work = work_folder(settings)
    resumes = settings.resume and any(work.glob("checkpoint-*"))
    before = _noted(work / NOTES) if resumes else {"content": content}
    for what, value in content.items():
        if before.get("content", {}).get(what) != value:
            raise InputError(
                f"Cannot resume: the {what} is not what the run began with. Restore it, or start "
                "again with --overwrite."
            )
    return {
        "run": before.get("run") or uuid.uuid4().hex, "settings": asdict(settings),
        "content": content, "text_rows": text_rows(settings),
    }  # fmt: skip


_NOTED = {"run": str, "settings": dict, "content": dict, "text_rows": int}
_LOST = ("budget", "predicted", "measured", "measured_se", "share", "kept")


def _noted(path: Path) -> dict[str, Any]:
    """A JSON object of ours, without what is of another type; empty where it is missing."""
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, _NOTED.get(k, object))}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def kept(settings: TrainSettings, marker: str, run: str | None, resume_with: str) -> str:
    """What there is of a run that was stopped, and how to go on.

    Args:
        run: its id; None before it began.
        resume_with: the advice where there is a checkpoint.
    """
    output, work = Path(settings.output), work_folder(settings)
    if run and _noted(output / marker).get("run") == run:
        return whole(output)
    ours = settings.resume or (run and _noted(work / NOTES).get("run") == run)
    checkpoint = newest_whole(work) if ours else None
    if checkpoint is None:
        return NOTHING
    return f"Step {checkpoint.name.split('-')[1]} is kept. {resume_with}"


def make_way(settings: TrainSettings) -> None:
    """Now that a run begins: what it overwrites goes, and what it cannot resume."""
    work = work_folder(settings)
    if settings.overwrite and not settings.resume and work.exists():
        shutil.rmtree(work)
    for path in work.glob("checkpoint-*"):
        if fault(path):  # else new files would be mixed with its own
            shutil.rmtree(path)


def clean_up_after(settings: TrainSettings) -> None:
    """The same of a finished run that a kill kept from it; checkpoints of a longer one stay."""
    before = _noted(work_folder(settings) / NOTES)
    if not (before and _changed(settings, before)):
        clean_up(settings)


def clean_up(settings: TrainSettings) -> None:
    """The result is complete: its checkpoints are no longer needed, but for one to go on from."""
    wait_for_all()
    work = work_folder(settings)
    last = newest_whole(work) if settings.keep_checkpoint and is_main() else None
    if is_main():
        for path in [work] if last is None else work.glob("checkpoint-*"):
            if path != last:
                shutil.rmtree(path, ignore_errors=True)
