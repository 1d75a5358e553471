"""What a run would be, for --dry-run: measured on one real batch, nothing trained."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from hlora.core.pairs import Pair
from hlora.core.pairs import describe as noted
from hlora.files import size
from hlora.run.machine import peak_bytes
from hlora.run.settings import TrainSettings
from hlora.run.training import arguments


def steps_of(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps that the settings give for so many rows."""
    if settings.max_steps:
        return settings.max_steps
    per_epoch = -(-rows // settings.batch_size)
    return max(1, int(settings.epochs * max(1, -(-per_epoch // settings.gradient_accumulation))))


def describe(
    settings: TrainSettings,
    model: nn.Module,
    pairs: list[Pair],
    batch: dict[str, torch.Tensor],
    rows: int,
    tokens: str,
    importance: int,
) -> str:
    """A few lines: what is trained on how much, and about how much memory and time it takes.

    `importance` is its size in bytes. The time and memory of a step are those of one forward and
    backward pass over `batch`.
    """
    args = arguments(settings)
    steps = steps_of(settings, rows)
    seconds, memory = _one_pass(model, batch, args)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = ", ".join(str(r) for r in sorted({p.shape[2] for p in pairs}))
    extra = importance + 12 * trainable
    whole = steps * settings.gradient_accumulation * seconds
    return "\n".join(
        [
            f"model       {settings.model}: {sum(p.numel() for p in model.parameters()):,} "
            f"parameters in {next(model.parameters()).dtype} on {args.device}",
            f"adapter     r {ranks} on {len(noted(pairs))} matrices, {trainable:,} trained",
            f"data        {rows:,} rows, {tokens}",
            f"steps       {steps:,} of {settings.batch_size} rows × "
            f"{settings.gradient_accumulation} micro-batches",
            f"importance  {size(importance)}",
            f"memory      about {size(memory + extra)} at the peak",
            f"time        about {timedelta(seconds=round(whole))} (h:min:s), "
            f"{seconds:.2f} s for a batch here",
            "Every input was checked; nothing was trained or written.",
        ]
    )


def _one_pass(model: nn.Module, batch: dict[str, torch.Tensor], args: Any) -> tuple[float, int]:
    device = args.device
    if not getattr(model, "is_quantized", False):  # such a model stays where it was loaded
        model.to(device)
    cuda = device.type == "cuda"
    seconds = 0.0
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(args.bf16)):
            loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    model.zero_grad()
    return seconds, peak_bytes(gpu=cuda) or 0
