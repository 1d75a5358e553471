"""`hlora record`: phase ν."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hlora.core import store
from hlora.core.importance import Importance
from hlora.core.kinds import kind_named
from hlora.core.pairs import Pair
from hlora.core.recorder import describe_summary, summarize_norms
from hlora.data.text import Blocks, Source, blocks, mix, stack
from hlora.errors import InputError
from hlora.files import check_space, refuse_result, size
from hlora.hf.callbacks import RECORD_STATE, Record, save_importance
from hlora.hf.distributed import is_main
from hlora.hf.peft import find_pairs
from hlora.run.adapters import new_adapter
from hlora.run.dry_run import describe
from hlora.run.models import load, load_adapter, pick_device, pick_dtype
from hlora.run.progress import bar, quiet_libraries
from hlora.run.settings import RecordSettings
from hlora.run.training import arguments, check_unfinished, clean_up, seed_everything, train

HUB_BLOCKS = 4000
"""Rows taken of a hub data set, which may be endless, unless --text-blocks says otherwise."""


def run(settings: RecordSettings) -> None:
    """Train on general text and write the adapter with its importance to `settings.output`."""
    quiet_libraries()
    of = kind_named(settings.kind) if settings.kind else None
    trained = of is None or of.trained
    if not trained and not is_main():  # one process gathers it, and writes
        return
    output = Path(settings.output)
    sources = [Source.parse(spec, settings.text_column) for spec in settings.text]
    if len({s.name for s in sources}) < len(sources):
        raise InputError(
            "Two kinds of text have the same name: name them with --text NAME=WHERE ..."
        )
    needed_rows = 0 if of is None else of.rows_needed(_options(settings))
    refuse_result(output, settings.overwrite)
    check_unfinished(settings)
    recorder = _recorder(settings) if trained else None
    if recorder is not None:
        recorder.check_folders()
        of = kind_named(recorder.kind)
    assert of is not None
    arguments(settings)
    device = pick_device(settings.device)
    model, tokenizer = load(settings.model, dtype=pick_dtype(settings.dtype, device), device=device)
    seed_everything(settings.seed)  # here: loading a GGUF file draws random numbers
    kinds = {
        s.name: blocks(
            s, tokenizer, settings.block_size,
            settings.text_blocks or (max(HUB_BLOCKS, needed_rows) if s.hub else None),
        )
        for s in sources
    }  # fmt: skip
    rows = mix(kinds, settings.text_weights or None, settings.text_blocks or None)
    if settings.importance:
        model = load_adapter(model, settings.importance, trainable=True)
    else:
        model = new_adapter(model, settings)
    pairs = find_pairs(model)
    shapes = [p.shape[:2] for p in pairs]
    needed, running = of.bytes(shapes, settings.storage), of.bytes(shapes)
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
        summary = _gather(settings, of, model, pairs, rows, notes)
    else:
        recorder.notes = notes
        train(
            settings, model, Blocks(rows), [recorder], what="record (ν)", state=RECORD_STATE,
            collate=stack, resume_with=f"Go on with: hlora record ... --output {output} --resume",
        )  # fmt: skip
        clean_up(settings)
        summary = recorder.summary
    print(describe_summary(of.kind, summary))
    written = sum(f["bytes"] for f in store.read_info(output)["files"].values())
    print(f"{summary['seconds']:.0f} s, {size(written)} on disk.")


def _recorder(settings: RecordSettings) -> Record:
    return Record(
        settings.output, kind=settings.kind, storage=settings.storage, preset=settings.preset,
        previous=settings.importance, overwrite=settings.overwrite, estimator=settings.estimator,
        xi=settings.xi, xi_relative=settings.xi_relative, quiet=True,
        max_grad_norm=settings.training.get("max_grad_norm"),
    )  # fmt: skip


def _options(settings: RecordSettings) -> dict[str, Any]:
    """What a kind that is gathered by passes over text is told, the names without its own."""
    return {
        f.name.removeprefix("fisher_"): getattr(settings, f.name)
        for f in fields(settings)
        if f.name.startswith("fisher_")
    }


def _gather(
    settings: RecordSettings, of: type[Importance], model: nn.Module, pairs: list[Pair],
    rows: torch.Tensor, notes: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """An importance that needs no training: sequences forward and backward."""
    options = _options(settings)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
    rows = rows[order[: of.rows_needed(options) or None]]
    began = time.monotonic()
    with bar(f"{of.kind} importance", len(rows)) as shown:
        found, summary = of.gather(
            model, pairs, rows, batch_size=settings.batch_size, seed=settings.seed,
            tick=shown.update, **options,
        )  # fmt: skip
    importance = found.stored_as(settings.storage)
    seconds = round(time.monotonic() - began, 1)
    summary = {**summary, "seconds": seconds, **summarize_norms(importance.norms())}
    notes |= {
        "recording": {**options, "storage": settings.storage},
        "previous": settings.importance, "summary": summary,
    }  # fmt: skip
    save_importance(Path(settings.output), model, pairs, importance, notes)
    return summary
