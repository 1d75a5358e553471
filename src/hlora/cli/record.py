"""`hlora record`: phase ν."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hlora.core import store
from hlora.core.importance import fisher, fisher_original
from hlora.core.pairs import Pair
from hlora.data.text import Blocks, Source, blocks, mix, stack
from hlora.errors import InputError
from hlora.files import check_space, refuse_result, size
from hlora.hf.distributed import is_main
from hlora.hf.peft import find_pairs
from hlora.hf.record import STATE, Record, describe_summary, summarize_norms
from hlora.run.adapters import new_adapter
from hlora.run.dry_run import describe, importance_bytes
from hlora.run.models import load, load_adapter, pick_device, pick_dtype
from hlora.run.progress import bar, quiet_libraries
from hlora.run.settings import RecordSettings
from hlora.run.training import arguments, check_unfinished, clean_up, seed_everything, train

HUB_BLOCKS = 4000
"""Rows taken of a hub data set, which may be endless, unless --text-blocks says otherwise."""
LEAN = 200
"""Sequences that a lean Fisher takes."""


def run(settings: RecordSettings) -> None:
    """Train on general text and write the adapter with its importance to `settings.output`."""
    quiet_libraries()
    if settings.kind == "fisher" and not is_main():  # one process gathers it, and writes
        return
    if settings.preset == "official":  # their gradients are unclipped
        settings = replace(settings, training={"max_grad_norm": 0.0, **settings.training})
    output = Path(settings.output)
    sources = [Source.parse(spec, settings.text_column) for spec in settings.text]
    if len({s.name for s in sources}) < len(sources):
        raise InputError(
            "Two kinds of text have the same name: name them with --text NAME=WHERE ..."
        )
    if settings.fisher_method == "original" and settings.fisher_labels == "model":
        raise InputError(
            "--fisher-method original takes the corpus' labels: leave out --fisher-labels."
        )
    fisher_rows = _fisher_rows(settings)
    refuse_result(output, settings.overwrite)
    check_unfinished(settings)
    recorder = None if settings.kind == "fisher" else _recorder(settings)
    arguments(settings)
    device = pick_device(settings.device)
    model, tokenizer = load(settings.model, dtype=pick_dtype(settings.dtype, device), device=device)
    seed_everything(settings.seed)  # here: loading a GGUF file draws random numbers
    kinds = {
        s.name: blocks(
            s, tokenizer, settings.block_size,
            settings.text_blocks or (max(HUB_BLOCKS, fisher_rows) if s.hub else None),
        )
        for s in sources
    }  # fmt: skip
    rows = mix(kinds, settings.text_weights or None, settings.text_blocks or None)
    if settings.importance:
        model = load_adapter(model, settings.importance, trainable=True)
    else:
        model = new_adapter(model, settings)
    pairs = find_pairs(model)
    kind = recorder.kind if recorder else "fisher"
    needed = importance_bytes(pairs, kind, settings.storage)
    running = importance_bytes(pairs, kind, "fp32")
    check_space(output, needed + (4 * running if settings.save_steps else 0))
    if settings.dry_run:
        batch = dict.fromkeys(("input_ids", "labels"), rows[: settings.batch_size])
        print(describe(settings, model, pairs, batch, len(rows), rows.numel(), needed))
        return
    print(
        f"Recording on {len(rows):,} rows of {settings.block_size} tokens ("
        + ", ".join(f"{name} {len(b):,}" for name, b in kinds.items())
        + f"), {len(pairs)} matrices, {size(needed)} of importance."
    )
    notes = {"settings": asdict(settings), "text": {n: len(b) for n, b in kinds.items()}}
    if recorder is None:
        summary = _gather_fisher(settings, model, pairs, rows, notes)
    else:
        recorder.notes = notes
        train(
            settings, model, Blocks(rows), [recorder], what="record (ν)", state=STATE,
            collate=stack, resume_with=f"Go on with: hlora record ... --output {output} --resume",
        )  # fmt: skip
        clean_up(settings)
        summary = recorder.summary
    print(describe_summary(summary, output))
    written = sum(f["bytes"] for f in store.read_info(output)["files"].values())
    print(f"{summary['seconds']:.0f} s, {size(written)} on disk.")


def _recorder(settings: RecordSettings) -> Record:
    return Record(
        settings.output, kind=settings.kind, storage=settings.storage, preset=settings.preset,
        previous=settings.importance, overwrite=settings.overwrite, estimator=settings.estimator,
        xi=settings.xi, xi_relative=settings.xi_relative, quiet=True,
    )  # fmt: skip


def _fisher_rows(settings: RecordSettings) -> int:
    """How many rows of text the Fisher information takes, if there are so many."""
    if settings.kind != "fisher":
        return 0
    usual = fisher_original.SEQUENCES if settings.fisher_method == "original" else LEAN
    return settings.fisher_sequences or usual


def _gather_fisher(
    settings: RecordSettings, model: nn.Module, pairs: list[Pair], rows: torch.Tensor,
    notes: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """EWC's importance: no training, sequences forward and backward."""
    original = settings.fisher_method == "original"
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
    rows = rows[order[: _fisher_rows(settings)]]
    labels = settings.fisher_labels or ("corpus" if original else "model")
    extra: dict[str, Any] = {}
    began = time.monotonic()
    with bar("Fisher information", len(rows)) as shown:
        if original:
            found, extra["all_parameters_bytes"] = fisher_original.gather(
                model, rows, tick=shown.update
            )
        else:
            found = fisher.gather(
                model, rows, labels=labels, batch_size=settings.batch_size, seed=settings.seed,
                tick=shown.update,
            )  # fmt: skip
    importance = found.stored_as(settings.storage)
    summary = {
        "sequences": len(rows), "labels": labels, "method": settings.fisher_method, **extra,
        "seconds": round(time.monotonic() - began, 1), **summarize_norms(importance.norms()),
    }  # fmt: skip
    notes |= {
        "recording": {"labels": labels, "storage": settings.storage},
        "previous": settings.importance, "summary": summary,
    }  # fmt: skip
    store.save(Path(settings.output), model, pairs, importance, notes)
    return summary
