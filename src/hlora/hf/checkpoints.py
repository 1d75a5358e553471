"""Checkpoints that are whole: sealed when written, and the newest sealed one is resumed.

Trainer writes a checkpoint file by file, and resumes what it finds.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hlora.errors import StoreError
from hlora.files import MANIFEST, fault, seal
from hlora.hf.distributed import wait_for_all

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
            if _at_its_end(path, args):
                args.max_steps, args.num_train_epochs = -1, 0
        try:
            return inner(resume_from_checkpoint, *rest, **named)
        finally:
            for name, value in before.items():
                setattr(args, name, value)

    train.joined_by_hlora = True  # type: ignore[attr-defined]
    trainer.train = train


_CHANGED = ("resume_from_checkpoint", "max_steps", "num_train_epochs")


def _at_its_end(checkpoint: Path, args: Any) -> bool:
    """Whether nothing is left to train: Trainer takes a step before it looks."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        if args.max_steps > 0:
            return bool(state["global_step"] >= args.max_steps)
        return bool(state["epoch"] >= args.num_train_epochs)
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"The checkpoint {checkpoint} cannot be resumed (trainer_state.json is missing or "
            "damaged): resume another one."
        ) from None
