"""A Trainer whose settings were tried: what its parts refuse is said before the work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hlora.errors import InputError, is_memory, one_line
from hlora.files import is_full_disk


def make_trainer(
    model: nn.Module, args: TrainingArguments, data: Any, collate: Callable | None
) -> Trainer:
    """A Trainer that could make its optimizer, schedule and batches; it makes them again itself.

    Raises:
        InputError: one of them refuses a setting, or needs a package that is missing.
    """
    try:
        if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            raise ImportError("use_liger_kernel needs liger-kernel: pip install liger-kernel")
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
        with torch.random.fork_rng(devices=[]):
            trainer.create_optimizer_and_scheduler(max(args.max_steps, 1))
            next(iter(trainer.get_train_dataloader().batch_sampler), None)
    except Exception as error:  # one of dozens of optimizers may raise anything
        if is_full_disk(error) or is_memory(error):
            raise
        said = one_line(error, 240) or type(error).__name__
        raise InputError(f"Trainer refuses these settings: {said}") from None
    trainer.optimizer = trainer.lr_scheduler = None
    return trainer
