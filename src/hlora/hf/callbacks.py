"""What hlora's callbacks share: one optimizer's steps, and a file beside each checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hlora.core.pairs import Group, Pair, describe, digest
from hlora.core.steps import Steps, steps_of
from hlora.errors import StoreError, UnsupportedModelError, in_short
from hlora.hf.distributed import refuse_plan
from hlora.hf.peft import unheld_names

logger = logging.getLogger(__name__)


class Attached(TrainerCallback):
    """A callback that acts through the optimizer's steps.

    Attributes:
        steps: those of the optimizer while it runs, else None.
        unheld: `refuse` trained parameters that no importance covers, or `warn` of them.
    """

    steps: Steps | None = None
    unheld = "refuse"
    _from = 0
    _seen = 0

    def check(self, model: nn.Module, args: Any) -> None:
        """Refuse what cannot work, before anything is trained or sharded; `attach` calls it."""

    def follow(
        self, optimizer: Any, model: nn.Module | None = None, pairs: Sequence[Pair] = ()
    ) -> Steps:
        """Act on the steps of this optimizer from now on; what is in no pair is named once."""
        self.steps = steps_of(optimizer)
        free = unheld_names(model, list(pairs)) if model is not None else []
        if free and not self.steps.told:
            self.steps.told = True
            logger.warning(
                "%d LoRA matrices are held; %s trained freely beside them, and nothing protects "
                "what these forget.", len(describe(pairs)),
                in_short(free) + (" is" if len(free) == 1 else " are"),
            )  # fmt: skip
        self._seen = self.steps.seen
        self.steps.restart()
        return self.steps

    def begin(self, args: Any, state: Any) -> bool:
        """Refuse what cannot work; whether training starts from the beginning."""
        refuse_plan(args)
        self._from = state.global_step
        return state.global_step == 0

    def check_reached(self, args: Any, state: Any) -> None:
        """Raise UnsupportedModelError where no step of the training was seen, or none acted.

        In fp16 all steps of a short run may be skipped, because of infinite gradients.
        """
        reached = self.steps is not None and self.steps.seen > self._seen
        if state.global_step > self._from and not reached and not args.fp16:
            raise UnsupportedModelError(
                "The optimizer never took a step that hlora could see, so nothing was recorded or "
                "held: this optimizer or launcher is not supported. Train with a torch optimizer "
                "such as adamw_torch."
            )
        if reached and self.steps is not None and args.learning_rate and not self.steps.moved():
            raise UnsupportedModelError(
                "No step of the optimizer moved any weight, so nothing was learned: this optimizer "
                "is not supported, its learning rate stayed 0, or all gradients were zero, as they "
                "are where all rewards are the same."
            )

    @staticmethod
    def written_to(args: Any, state: Any) -> Path:
        """The checkpoint of the present step."""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    @classmethod
    def resumed_from(cls, args: Any, state: Any) -> Path:
        """The checkpoint that was just resumed; `attach` tells it by the arguments."""
        given = args.resume_from_checkpoint
        return Path(given) if isinstance(given, str) else cls.written_to(args, state)

    @staticmethod
    def check_bound(notes: dict[str, Any], groups: list[Group], path: Path) -> None:
        """Raise StoreError where a state was written with other weights than are resumed."""
        if "weights" in notes and notes["weights"] != digest(groups):
            raise StoreError(
                f"{path} belongs to another run: it was written with other LoRA weights than those "
                "that were resumed. Attach with hlora.attach, which takes it from the checkpoint."
            )
