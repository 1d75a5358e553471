"""What a run would be, for --dry-run: measured on one real batch, nothing trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import nn

from hlora.core.pairs import Pair
from hlora.core.pairs import describe as noted
from hlora.files import size
from hlora.run.machine import peak_bytes
from hlora.run.settings import TrainSettings
from hlora.run.training import arguments


class Beside(NamedTuple):
    """What a run does now and then beside its own batches.

    Attributes:
        what: a word.
        times: how often in the run.
        once: does it once.
    """

    what: str
    times: int
    once: Callable[[], Any]


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
    beside: Callable[[int], Iterable[Beside]],
) -> str:
    """A few lines: what is trained on how much, and about how much memory and time it takes.

    `importance` is its size in bytes. The time and memory of a step are those of one forward and
    backward pass over `batch`; what is done `beside`, given the number of steps, is timed too.
    """
    args = arguments(settings)
    steps = steps_of(settings, rows)
    seconds = _one_pass(model, batch, args)
    others = [(of, _timed(of.once, args)) for of in beside(steps) if of.times]
    model.zero_grad()
    memory = peak_bytes(gpu=args.device.type == "cuda") or 0
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = ", ".join(str(r) for r in sorted({p.shape[2] for p in pairs}))
    adapter = f"r {ranks} on {len(noted(pairs))} matrices" if pairs else "not LoRA"
    extra = importance + 12 * trainable
    whole = steps * settings.gradient_accumulation * seconds
    whole += sum(of.times * once for of, once in others)
    return "\n".join(
        [
            f"model       {settings.model}: {sum(p.numel() for p in model.parameters()):,} "
            f"parameters in {next(model.parameters()).dtype} on {args.device}",
            f"adapter     {adapter}, {trainable:,} trained",
            f"data        {rows:,} rows, {tokens}",
            f"steps       {steps:,} of {settings.batch_size} rows × "
            f"{settings.gradient_accumulation} micro-batches",
            *(f"{of.what:11} {of.times:,} in all, {once:.2f} s each here" for of, once in others),
            f"importance  {size(importance)}",
            f"memory      about {size(memory + extra)} at the peak",
            f"time        about {timedelta(seconds=round(whole))} (h:min:s), "
            f"{seconds:.2f} s for a batch here",
            "Every input was checked; nothing was trained or written.",
        ]
    )


def _one_pass(model: nn.Module, batch: dict[str, torch.Tensor], args: Any) -> float:
    """Seconds."""
    if not getattr(model, "is_quantized", False):  # such a model stays where it was loaded
        model.to(args.device)

    def once() -> None:
        model(**{k: v.to(args.device) for k, v in batch.items()}).loss.backward()

    return _timed(once, args)


def _timed(once: Callable[[], Any], args: Any) -> float:
    """Seconds."""
    device = args.device
    seconds = 0.0
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(args.bf16)):
            once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds
