"""Perplexity by kind of text, accuracy and NLL by task, and how much was forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hlora.core.adapter_file import read_config
from hlora.data.source import sources
from hlora.data.tasks import Task, load_tasks
from hlora.data.text import blocks
from hlora.errors import InputError
from hlora.files import refuse_file, write_json
from hlora.hf.limits import vocabulary
from hlora.hf.peft import moves_base
from hlora.run import basepass, harness
from hlora.run.evaluate import figures_of, forgetting, score_task, score_text
from hlora.run.inputs import bits
from hlora.run.models import (
    block_size,
    check_adapter_of,
    load,
    load_adapter,
    pick_device,
    pick_dtype,
)
from hlora.run.outputs import tidied
from hlora.run.progress import bar
from hlora.run.settings import BLOCK, EvalSettings

Scores = dict[str, dict[str, Any]]
"""`text`, `task` and `lm_eval`, each a score by name."""
Before = Mapping[str, Iterator[Tensor] | None]
"""The base model's logits by kind of text, batch by batch."""


@tidied
def evaluate(settings: EvalSettings) -> dict[str, Scores]:
    """The scores of the `base` model, and of the `adapter` if there is one.

    With `settings.json` all figures are also written to that file.

    Raises:
        HloraError: nothing to score, or text, tasks, model or adapter that cannot be used.
    """
    if not (settings.text or settings.task or settings.lm_eval):
        raise InputError("Nothing to evaluate: give --text, --task or --lm-eval.")
    if settings.json:
        refuse_file(Path(settings.json), settings.overwrite)
    named = [t for spec in settings.lm_eval for t in spec.split(",") if t]
    zoo = harness.prepare(named) if named else None  # checked before the model loads
    model, tokenizer, kinds, tasks = prepare(settings)
    kept: Callable[[nn.Module], Before] | None = None
    if settings.adapter:  # before minutes of the base model
        folder = check_adapter_of(model, settings.adapter, others=True)
        if moves_base(read_config(folder)):
            kept = _kept(model, kinds, settings)

    def all_scores(of: nn.Module) -> Scores:
        adapted = of is not model
        before = kept(of) if adapted and kept else None
        scores = score(of, tokenizer, kinds, tasks, settings.batch_size, adapted, before)
        if zoo:
            scores["lm_eval"] = harness.run(
                of, tokenizer, zoo, batch_size=settings.batch_size,
                limit=settings.task_rows or None,
            )  # fmt: skip
        return scores

    found = {"base": all_scores(model)}
    if settings.adapter:
        found["adapter"] = all_scores(load_adapter(model, settings.adapter, others=True))
    if settings.json:
        write_json(Path(settings.json), _as_json(settings, found))
    return found


def prepare(
    settings: EvalSettings,
) -> tuple[nn.Module, Any, dict[str, Tensor], list[Task]]:
    """The base model, its tokenizer, blocks by kind of text, and tasks."""
    texts = sources(settings.text, settings.text_column)
    tasks = load_tasks(
        settings.task, split="test", format=settings.task_format,
        limit=settings.task_rows or None,
    )  # fmt: skip
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    model, tokenizer = load(settings.model, dtype=dtype, device=device, bits=bits(settings))
    size = block_size(model, settings.block_size, BLOCK) if texts else 0
    kinds = {
        s.name: blocks(
            s,
            tokenizer,
            size,
            settings.text_blocks or None,
            vocabulary(model),
            settings.per_document,
        )
        for s in texts
    }
    tasks = [t.rendered(tokenizer) for t in tasks]
    return model, tokenizer, kinds, tasks


def score(
    model: nn.Module, tokenizer: Any, kinds: dict[str, Tensor], tasks: list[Task],
    batch_size: int, divergence: bool = False,
    before: Before | None = None,
) -> Scores:  # fmt: skip
    """Scores by kind of text under `text`, by task under `task`.

    `before` has the base model's logits by kind of text, where they are there already.
    """
    result: Scores = {"text": {}, "task": {}}
    for name, rows in kinds.items():
        with bar(name, len(rows)) as shown:
            result["text"][name] = score_text(
                model, rows, batch_size=batch_size, tick=shown.update, divergence=divergence,
                before=(before or {}).get(name),
            )  # fmt: skip
    for task in tasks:
        with bar(task.name, sum(len(e.choices) for e in task.examples)) as shown:
            result["task"][task.name] = score_task(
                model, tokenizer, task, batch_size=batch_size, tick=shown.update
            )
    return result


def _kept(
    model: nn.Module, kinds: dict[str, Tensor], settings: EvalSettings
) -> Callable[[nn.Module], Before]:
    """The base model's predictions, of the model with an adapter that moves its weights.

    Raises:
        InputError: they cannot be kept.
    """
    head = copy.deepcopy(model.get_output_embeddings())  # type: ignore[operator]
    read: dict[str, list[Tensor]] = {}
    for name, rows in kinds.items():
        with basepass.listening(model) as reads, bar(f"{name}, base", len(rows)) as shown:
            score_text(model, rows, batch_size=settings.batch_size, tick=shown.update)
        if reads.batches is None:
            raise InputError(
                f"The initialization of {settings.adapter} moved the base model, whose predictions "
                "cannot be kept beside it: convert it to plain LoRA first (PEFT's "
                "path_initial_model_for_weight_conversion)."
            )
        read[name] = reads.batches
    return lambda adapted: {k: basepass.predictions(adapted, of, head) for k, of in read.items()}


def _as_json(settings: EvalSettings, scores: dict[str, Scores]) -> dict[str, Any]:
    result: dict[str, Any] = {"settings": asdict(settings)}
    for which, of in scores.items():
        result[which] = {
            group: {name: figures_of(s) for name, s in named.items()} for group, named in of.items()
        }
    if "adapter" in scores:
        result["forgetting"] = {
            name: asdict(forgetting(before, scores["adapter"]["text"][name]))
            for name, before in scores["base"]["text"].items()
        }
        result["divergence"] = {
            name: asdict(s.divergence) for name, s in scores["adapter"]["text"].items()
        }
    return result
