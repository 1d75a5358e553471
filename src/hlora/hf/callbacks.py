"""What hlora's callbacks share: one optimizer's steps, and a file beside each checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hlora.core.steps import Steps
from hlora.errors import UnsupportedModelError
from hlora.hf.distributed import refuse_sharded


class Attached(TrainerCallback):
    """A callback that acts through the optimizer's steps.

    Attributes:
        steps: those of the optimizer while it runs, else None.
    """

    steps: Steps | None = None
    _from = 0

    def begin(self, args: Any, state: Any) -> bool:
        """Refuse what cannot work; whether training starts from the beginning."""
        refuse_sharded(args)
        self._from = state.global_step
        return state.global_step == 0

    def check_reached(self, state: Any) -> None:
        """Raise UnsupportedModelError where the Trainer trained and no step was seen."""
        if state.global_step > self._from and (self.steps is None or not self.steps.seen):
            raise UnsupportedModelError(
                "The optimizer never took a step that hlora could see, so nothing was recorded or "
                "held: this optimizer or launcher is not supported. Train with a torch optimizer "
                "such as adamw_torch."
            )

    @staticmethod
    def checkpoint(args: Any, state: Any) -> Path:
        """The folder of the present step: about to be written, or just resumed from."""
        given = args.resume_from_checkpoint
        if isinstance(given, str) and given.rstrip("/").endswith(f"-{state.global_step}"):
            return Path(given)
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
