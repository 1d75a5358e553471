"""What a run would be, for --dry-run: measured on one real batch, nothing trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
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


class Work(NamedTuple):
    """The batches that a run is made of.

    Attributes:
        said: a line on them.
        times: how many.
        once: does one, or a few.
        does: how many it does.
        state: bytes that are kept meanwhile, beside weights and importance.
        mixed: in mixed precision, as Trainer computes.
    """

    said: str
    times: int
    once: Callable[[], Any]
    does: float = 1.0
    state: int = 0
    mixed: bool = True


class Beside(NamedTuple):
    """What a run does now and then beside its own batches.

    Attributes:
        what: a word.
        times: how often in the run.
        once: does it once, or `does` times.
        mixed: as that of `Work`.
    """

    what: str
    times: int
    once: Callable[[], Any]
    does: float = 1.0
    mixed: bool = True


def steps_of(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps that the settings give for so many rows."""
    if settings.max_steps:
        return settings.max_steps
    per_epoch = -(-rows // settings.batch_size)
    return max(1, int(settings.epochs * max(1, -(-per_epoch // settings.gradient_accumulation))))


def training(
    settings: TrainSettings, model: nn.Module, batch: dict[str, torch.Tensor], steps: int
) -> Work:
    """So many optimizer steps, each as long as a forward and a backward pass over `batch`."""

    def once() -> None:
        device = next(model.parameters()).device
        model(**{k: v.to(device) for k, v in batch.items()}).loss.backward()

    said = (
        f"steps       {steps:,} of {settings.batch_size} rows × "
        f"{settings.gradient_accumulation} micro-batches"
    )
    state = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Work(said, steps * settings.gradient_accumulation, once, state=state)


def describe(
    settings: TrainSettings,
    model: nn.Module,
    pairs: list[Pair],
    data: str,
    work: Work,
    importance: int,
    beside: Iterable[Beside],
) -> str:
    """A few lines: what is done on how much, and about how much memory and time it takes.

    `importance` is its size in bytes. One batch of the work, and what is done `beside`, are timed.
    """
    args = arguments(settings)
    if not getattr(model, "is_quantized", False):  # such a model stays where it was loaded
        model.to(args.device)
    seconds = _timed(work, args)
    others = [(of, _timed(of, args)) for of in beside if of.times]
    model.zero_grad()
    memory = peak_bytes(gpu=args.device.type == "cuda") or 0
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = ", ".join(str(r) for r in sorted({p.shape[2] for p in pairs}))
    adapter = f"r {ranks} on {len(noted(pairs))} matrices" if pairs else "not LoRA"
    trained = f"{trainable:,} trained" if work.state else "not trained"
    whole = work.times * seconds + sum(of.times * once for of, once in others)
    return "\n".join(
        [
            f"model       {settings.model}: {sum(p.numel() for p in model.parameters()):,} "
            f"parameters in {next(model.parameters()).dtype} on {args.device}",
            f"adapter     {adapter}, {trained}",
            f"data        {data}",
            work.said,
            *(f"{of.what:11} {of.times:,} in all, {once:.2f} s each here" for of, once in others),
            f"importance  {size(importance)}",
            f"memory      about {size(memory + importance + work.state)} at the peak",
            f"time        about {timedelta(seconds=round(whole))} (h:min:s), "
            f"{seconds:.2f} s for a batch here",
            "Every input was checked; nothing was trained or written.",
        ]
    )


def _timed(of: Work | Beside, args: Any) -> float:
    """Seconds for one."""
    device = args.device
    mixed = of.mixed and bool(args.bf16)
    seconds = 0.0
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            of.once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds / of.does
