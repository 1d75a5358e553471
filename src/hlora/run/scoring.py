"""Perplexity by kind of text, accuracy and NLL by task, and how much was forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
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
from hlora.hf.peft import PLAIN_FIRST, moves_base
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
Keep = Callable[[str, basepass.Reads], None]
"""Takes a kind of text, and what the head read of it."""


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
    keep, read, head = None, dict[str, list[Tensor]](), None
    if settings.adapter:  # before minutes of the base model
        folder = check_adapter_of(model, settings.adapter, others=True)
        if moves_base(read_config(folder)):
            head = copy.deepcopy(model.get_output_embeddings())  # type: ignore[operator]

            def keep(kind: str, reads: basepass.Reads) -> None:
                if reads.batches is None:
                    raise InputError(
                        f"The initialization of {settings.adapter} moved the base model, whose "
                        f"predictions cannot be kept beside it: {PLAIN_FIRST}"
                    )
                read[kind] = reads.batches

    def all_scores(of: nn.Module, **more: Any) -> Scores:
        scores = score(of, tokenizer, kinds, tasks, settings.batch_size, **more)
        if zoo:
            scores["lm_eval"] = harness.run(
                of, tokenizer, zoo, batch_size=settings.batch_size,
                limit=settings.task_rows or None,
            )  # fmt: skip
        return scores

    found = {"base": all_scores(model, keep=keep)}
    if settings.adapter:
        adapted = load_adapter(model, settings.adapter, others=True)
        before = {kind: basepass.predictions(adapted, of, head) for kind, of in read.items()}
        found["adapter"] = all_scores(adapted, divergence=True, before=before)
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
    before: Mapping[str, Iterator[Tensor] | None] | None = None, keep: Keep | None = None,
) -> Scores:  # fmt: skip
    """Scores by kind of text under `text`, by task under `task`.

    `before` has the base model's logits by kind of text, where they are there already; `keep` is
    given what they are made of.
    """
    result: Scores = {"text": {}, "task": {}}
    for name, rows in kinds.items():
        listening = basepass.listening(model) if keep else nullcontext()
        with bar(name, len(rows)) as shown, listening as reads:
            result["text"][name] = score_text(
                model, rows, batch_size=batch_size, tick=shown.update, divergence=divergence,
                before=(before or {}).get(name),
            )  # fmt: skip
        if keep and reads:
            keep(name, reads)
    for task in tasks:
        with bar(task.name, sum(len(e.choices) for e in task.examples)) as shown:
            result["task"][task.name] = score_task(
                model, tokenizer, task, batch_size=batch_size, tick=shown.update
            )
    return result


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
