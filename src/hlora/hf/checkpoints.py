"""Checkpoints that are whole: sealed when written, and the newest sealed one is resumed.

Trainer writes a checkpoint file by file, and resumes what it finds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from hlora.errors import HloraError, StoreError, is_memory, one_line
from hlora.files import MANIFEST, fault, seal
from hlora.hf.distributed import wait_for_all
from hlora.hf.regularize import Regularization

logger = logging.getLogger(__name__)


class Seal(TrainerCallback):
    """Writes the checksums of a checkpoint, once all others have added their files to it."""

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        wait_for_all()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in a folder with all that was written; None if there is none.

    Newer ones that are not whole are named in a warning.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        why = fault(path)
        if why is None:
            return path
        logger.warning("%s is incomplete (%s) and is skipped.", path, why)
    return None


def join_train(trainer: Any) -> None:
    """Have `trainer.train` resume whole checkpoints only, once however often it is joined.

    `resume_from_checkpoint=True` takes the newest that is whole. Our callbacks find the folder in
    the arguments. A run that had come to its end is not trained one step more.
    """
    inner = trainer.train
    if getattr(inner, "joined_by_hlora", False):
        return
    for name in _LOADERS:
        if load := getattr(trainer, name, None):
            setattr(trainer, name, _told(load))

    def train(resume_from_checkpoint: Any = None, *rest: Any, **named: Any) -> Any:
        args = trainer.args
        if resume_from_checkpoint is True:
            # Without one Trainer looks for itself: it may have been written without our parts.
            resume_from_checkpoint = newest_whole(Path(args.output_dir)) or True
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        before = {k: getattr(args, k) for k in _CHANGED}
        args.resume_from_checkpoint = resume_from_checkpoint
        if isinstance(resume_from_checkpoint, str):
            path = Path(resume_from_checkpoint)
            if (path / MANIFEST).exists() and (why := fault(path)):
                raise StoreError(f"The checkpoint {path} is damaged ({why}): resume another one.")
            _refuse_left_out(path, trainer.callback_handler.callbacks)
            if _at_its_end(path, args):
                args.max_steps, args.num_train_epochs = -1, 0
        try:
            return inner(resume_from_checkpoint, *rest, **named)
        finally:
            for name, value in before.items():
                setattr(args, name, value)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, Regularization):  # also after an error: the model may go
                    callback.finish()

    train.joined_by_hlora = True  # type: ignore[attr-defined]
    trainer.train = train


def _refuse_left_out(checkpoint: Path, callbacks: list[Any]) -> None:
    """A run that is resumed without one of its recordings or penalties would silently go on."""
    attached = {getattr(c, "state_file", None) for c in callbacks}
    left = sorted(p.name for p in checkpoint.glob("hlora_*.safetensors") if p.name not in attached)
    if left:
        raise StoreError(
            f"{checkpoint} holds {left[0]} of a recording or regularizer that is not attached: "
            "attach the same ones in the same order as in the run that is resumed."
        )


_CHANGED = ("resume_from_checkpoint", "max_steps", "num_train_epochs")


_LOADERS = (
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state",
)  # fmt: skip
"""By which Trainer reads the files of a checkpoint, whatever they hold."""


def _told(load: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with one error."""

    @wraps(load)
    def told(checkpoint: Any = None, *rest: Any, **named: Any) -> Any:
        try:
            return load(checkpoint, *rest, **named)
        except HloraError:
            raise
        except Exception as error:  # a damaged or hostile file may raise anything
            if is_memory(error):
                raise
            raise _not_resumed(checkpoint, one_line(error)) from None

    return told


def _not_resumed(checkpoint: Any, why: str) -> StoreError:
    return StoreError(f"The checkpoint {checkpoint} cannot be resumed ({why}): resume another one.")


def _at_its_end(checkpoint: Path, args: Any) -> bool:
    """Whether nothing is left to train: Trainer takes a step before it looks."""
    usual = vars(TrainerState())
    try:
        found = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        for name, value in vars(found).items():
            kind = type(usual[name])
            fits = (int, float) if kind in (int, float) else kind
            if usual[name] is not None and not isinstance(value, fits):
                raise TypeError(name)
        if not isinstance(found.train_batch_size, (int, type(None))):
            raise TypeError("train_batch_size")
        if not isinstance(found.best_model_checkpoint, (str, type(None))):
            raise TypeError("best_model_checkpoint")
        if not (0 <= found.global_step < 2**53 and 0 <= found.epoch < 2**53):
            raise ValueError
        if not all(isinstance(e, dict) and _is_number(e.get("loss", 0)) for e in found.log_history):
            raise TypeError("log_history")
        if "TrainerControl" not in found.stateful_callbacks:  # Trainer writes into it
            raise KeyError("stateful_callbacks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _not_resumed(checkpoint, "trainer_state.json is missing or damaged") from None
    if args.max_steps > 0:
        return bool(found.global_step >= args.max_steps)
    return bool(found.epoch >= args.num_train_epochs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
