"""The learning rate of a run that was made longer."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback


class ResumedRate(TrainerCallback):
    """Takes the first step after a resume at the rate of the schedule as it is now.

    A checkpoint brings the optimizer's last rate back, and the schedule is asked after a step only:
    a finished run that is made longer would take its first step at the rate that it ended with, 0.
    """

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):  # type: ignore[no-untyped-def]
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if isinstance(schedule, LambdaLR):
            of = zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            )
            for group, highest, share in of:
                group["lr"] = highest * share(schedule.last_epoch)
