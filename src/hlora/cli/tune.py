"""`hlora tune`: phase μ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hlora import __version__
from hlora.core.store import TENSORS
from hlora.data.tasks import Answers, Pad, load_task
from hlora.errors import InputError
from hlora.files import check_space, publish, refuse_result, write_json
from hlora.hf.callbacks import Penalty
from hlora.hf.distributed import is_main
from hlora.hf.peft import base_of, find_pairs, save_adapter
from hlora.run.adapters import new_adapter
from hlora.run.dry_run import describe
from hlora.run.models import load, load_adapter, pick_device, pick_dtype
from hlora.run.progress import quiet_libraries
from hlora.run.settings import TuneSettings
from hlora.run.training import (
    Trained,
    arguments,
    check_unfinished,
    clean_up,
    seed_everything,
    train,
)

MARKER = "tune.json"


def run(settings: TuneSettings) -> None:
    """Train on the domain under the penalty and write the adapter to `settings.output`."""
    quiet_libraries()
    output = Path(settings.output)
    if output.resolve() == Path(settings.importance).resolve():
        raise InputError("--output and --importance are one folder: choose another --output.")
    refuse_result(output, settings.overwrite)
    check_unfinished(settings)
    penalty = Penalty(
        settings.importance, phi=settings.phi, preset=settings.preset, anchor=settings.anchor,
        layer_weights=settings.layer_weights, normalize=settings.normalize,
    )  # fmt: skip
    task = load_task(settings.task, format=settings.task_format, limit=settings.task_rows or None)
    arguments(settings)
    device = pick_device(settings.device)
    model, tokenizer = load(settings.model, dtype=pick_dtype(settings.dtype, device), device=device)
    seed_everything(settings.seed)  # here: loading a GGUF file draws random numbers
    if settings.anchor == "nu":
        model = load_adapter(model, settings.importance, trainable=True)
    else:
        model = new_adapter(model, settings)
    pairs = find_pairs(model)
    penalty.stored.check(base_of(model, pairs), pairs, ranks=settings.anchor == "nu")
    data, pad = Answers(task, tokenizer, settings.max_length), Pad(tokenizer.pad_token_id or 0)
    check_space(output, 64 << 20)
    if settings.dry_run:
        batch = pad([data[i] for i in range(min(settings.batch_size, len(data)))])
        held = penalty.stored.info["files"][TENSORS]["bytes"]
        print(describe(settings, model, pairs, batch, len(data), data.tokens, held))
        return
    print(
        f"Tuning on {len(data):,} rows of {task.name} ({data.tokens:,} tokens), "
        f"φ {penalty.rule.phi:g}, anchored at {settings.anchor}."
    )
    trained = train(
        settings, model, data, [penalty], what=f"tune (μ, {task.name})", collate=pad,
        resume_with=f"Go on with: hlora tune ... --output {output} --resume",
    )  # fmt: skip
    if is_main():
        _write(output, settings, penalty, trained, model)
    clean_up(settings)
    last = trained.log[-1] if trained.log else {}
    print(
        f"Tuned {trained.steps} steps in {trained.seconds:.0f} s into {output}."
        + (f" Last loss {last['loss']:.4g}" if last else "")
        + (f", R {last['R']:.4g}, penalty {last['penalty']:.4g}." if "R" in last else "")
    )


def _write(
    output: Path, settings: TuneSettings, penalty: Penalty, trained: Trained, model: object
) -> None:
    with publish(output, MARKER) as aside:
        save_adapter(model, aside)  # type: ignore[arg-type]
        write_json(
            aside / MARKER,
            {
                "hlora_version": __version__,
                "settings": asdict(settings),
                "penalty": vars(penalty.rule),
                "seconds": round(trained.seconds, 1),
                "steps": trained.steps,
                "log": trained.log,
            },
        )
