"""Both phases as functions: `record(settings)` and `tune(settings)`.

They print nothing and change nothing outside the output folder. To look before training, prepare a
phase, ask it for its `plan`, and `run` it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from hlora import __version__
from hlora.core import card, store
from hlora.core.adapter_file import read_config
from hlora.core.importance import Importance
from hlora.core.importance.sequences import Sequences
from hlora.core.kinds import kind_named
from hlora.core.pairs import Pair, targets_of
from hlora.core.presets import RecordRule
from hlora.core.recorder import summarize_norms
from hlora.core.regularizer import Regularizer
from hlora.data.answers import answer_rows
from hlora.data.rows import FIRST, Collate, Rows
from hlora.data.source import Source, sources
from hlora.data.tasks import load_task
from hlora.data.text import block_rows, blocks, mix
from hlora.errors import InputError, MismatchError, UnsupportedModelError
from hlora.files import check_space, publish, without_nan, write_json
from hlora.hf.corda import Corda
from hlora.hf.distributed import is_main
from hlora.hf.divergence import Divergence, OnPrompts, Seldom
from hlora.hf.hub import check_name, pinned, push
from hlora.hf.limits import context, vocabulary
from hlora.hf.peft import base_of, find_pairs, save_adapter, without_adapter
from hlora.hf.record import Record, save_importance
from hlora.hf.regularize import Penalty
from hlora.hf.slow import ToSlow
from hlora.run import dry_run, machine
from hlora.run.build import default_of
from hlora.run.evaluate import divergence
from hlora.run.inputs import bits, check_apart
from hlora.run.models import (
    adapter_settings,
    block_size,
    follow_adapter,
    load,
    load_adapter,
    new_adapter,
    pick_device,
    pick_dtype,
)
from hlora.run.outputs import tidied
from hlora.run.own_text import own_text
from hlora.run.own_text import trial as own_text_trial
from hlora.run.progress import Interruptible, bar, unbroken
from hlora.run.rewind import within_budget
from hlora.run.settings import (
    BLOCK,
    GATHERED_BLOCK,
    OF_TRAINING,
    RecordSettings,
    TrainSettings,
    TuneSettings,
    listed,
)
from hlora.run.trainer import make_trainer
from hlora.run.training import (
    Trained,
    arguments,
    begin_run,
    check_unfinished,
    clean_up,
    clean_up_after,
    kept,
    make_way,
    read_trained,
    rows_needed,
    text_rows,
    tokenize,
    train,
)

HUB_BLOCKS = 4000
"""Rows taken of a hub data set, which may be endless, unless --text-blocks says otherwise."""
MEASURED_ON, MEASURED_BLOCKS = ["python-docs@test"], 36
"""Text of a budget, and rows of each kind: a third is watched while training, and two thirds are
what the end is checked on."""
WATCHED, OTHER_SEED = 16, 1 << 20
"""Rows that an importance keeps for measuring, and how their seed differs from the others'."""
LEAST_TRIED = 4
"""Rows that a plan gathers from at least, to know how long it takes."""
OWN, OWN_BLOCKS = "own", 128
"""The general text that the model writes itself while tuning, and its rows."""
ITS_PROMPTS = "task"
"""In place of general text for KL: the prompts of the task's own rows."""
CORDA_BLOCKS = 64
"""Rows of each kind of text that CorDA looks at."""
MOST_REPLAY = 0.99
"""Beyond it a task's rows are few among thousands."""
TUNED = "tune.json"
"""The marker of a finished domain phase."""


@dataclass(frozen=True)
class Recorded:
    """A finished general phase: its folder, the importance in it, and the size of its files."""

    folder: Path
    kind: str
    summary: dict[str, Any]
    bytes: int


@tidied
def record(settings: RecordSettings) -> Recorded:
    """Learn general text and record what matters for it (Eq. 2-13); or gather a Fisher.

    Raises:
        HloraError: a setting, text or model that cannot be used, before anything is trained.
    """
    _refuse_dry(settings, GeneralPhase)
    return GeneralPhase(settings).run()


@tidied
def tune(settings: TuneSettings) -> Trained:
    """Learn a domain, held to an importance if there is one (Eq. 14-16).

    Raises:
        HloraError: a setting, task or model that cannot be used, before anything is trained.
    """
    _refuse_dry(settings, DomainPhase)
    return DomainPhase(settings).run()


def _refuse_dry(settings: TrainSettings, phase: type) -> None:
    if settings.dry_run:
        raise InputError(
            f"dry_run runs nothing: {phase.__name__}(settings).plan() says what a run would do."
        )


Done = TypeVar("Done", Recorded, Trained)


class _Phase(Generic[Done]):
    """What both have."""

    settings: TrainSettings
    model: nn.Module
    tokenizer: Any
    rows: Rows
    pairs: list[Pair]
    command: str
    marker: str
    output: Path
    held: int  # bytes of the importance
    finished: bool  # a resumed run that had come to its end

    def __init__(self) -> None:
        self.also_read: list[Tensor] = []  # tokens besides `rows`
        self.begun: str | None = None  # the run's id
        self.stop: Interruptible | None = None  # of a training

    def _load_model(self) -> None:
        s = self.settings
        arguments(s)
        device = pick_device(s.device)
        self.model, self.tokenizer = load(
            s.model, dtype=pick_dtype(s.dtype, device), device=device, bits=bits(s)
        )
        set_seed(s.seed)  # for the adapter's start; after loading, since a GGUF file draws numbers
        self.collate = Collate(self.tokenizer.pad_token_id)

    def _begin(self) -> dict[str, Any]:
        base = base_of(self.model, self.pairs)
        run = begin_run(self.settings, base, self.rows, self.also_read)
        self.begun = run["run"]
        return run

    @property
    def _resume_with(self) -> str:
        over = "--overwrite " * self.settings.overwrite  # what it goes over is still there
        return f"Continue with: hlora {self.command} ... --output {self.output} {over}--resume"

    def _write_own(self, count: int, length: int, seed: int = 0) -> Tensor:
        with bar("the model's own text", count) as shown:
            return own_text(
                self.model, self.tokenizer, count, length, seed=self.settings.seed + seed,
                tick=shown.update,
            )  # fmt: skip

    def run(self) -> Done:
        """Train or gather, write the output folder, and upload it if asked to.

        A finished run that is resumed is read.

        Raises:
            InputError: the settings ask for a plan.
            HubError: the result is written, and could not be uploaded.
            KeyboardInterrupt: says what is kept.
        """
        s = self.settings
        _refuse_dry(s, type(self))
        try:
            done = self._run()
            if self.stop and self.stop.asked:
                raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            said = str(stop) or f"Stopped. {kept(s, self.marker, self.begun, self._resume_with)}"
            raise KeyboardInterrupt(said) from None
        if s.push_to_hub and is_main():
            only = " and without --overwrite" * s.overwrite
            again = f" The same command with --resume{only} tries again."
            record = getattr(s, "record", None)
            more = Path(record) if record else None
            push(Path(s.output), s.push_to_hub, more=more, public=s.public, advice=again)
        return done

    def _run(self) -> Done:
        raise NotImplementedError

    def plan(self) -> str:
        """What a run would do, and about how much time and memory it would take.

        Raises:
            InputError: Trainer refuses a setting.
        """
        work, beside = self._work()
        data = f"{len(self.rows):,} rows, {self.rows.tokens}"
        return dry_run.describe(
            self.settings, self.model, self.pairs, data, work, self.held, beside
        )

    def _work(self) -> tuple[dry_run.Work, Iterator[dry_run.Beside]]:
        """The batches of a run, and what it does beside them."""
        s = self.settings
        with tempfile.TemporaryDirectory() as aside:
            args = arguments(s)
            args.output_dir = aside
            make_trainer(self.model, args, self.rows, self.collate)
        batch = self.collate(self.rows.rows[: s.batch_size])
        steps = dry_run.steps_of(s, len(self.rows))
        return dry_run.training(s, self.model, batch, steps), self._beside(steps, batch)

    def _beside(self, steps: int, batch: dict[str, Tensor]) -> Iterator[dry_run.Beside]:
        """What a training of so many steps does beside its batches."""
        return iter(())

    def _writing(self, count: int, length: int) -> dry_run.Beside:
        once, does = own_text_trial(self.model, self.tokenizer, count, length)
        return dry_run.Beside("own text", count, once, does, mixed=False)


class GeneralPhase(_Phase[Recorded]):
    """The general phase, ν, ready to run.

    Attributes:
        texts: blocks of tokens by kind, (N, T) each.
        own: how many rows the model writes itself.
    """

    settings: RecordSettings
    command, marker = "record", store.MARKER
    own = 0

    def __init__(self, settings: RecordSettings) -> None:
        super().__init__()
        self.settings = settings
        self.output = Path(settings.output)
        texts = sources(settings.text, settings.text_column)
        check_name(settings.push_to_hub)
        if settings.importance:
            settings = replace(settings, importance=pinned(settings.importance))
            self.settings = settings = follow_adapter(settings, str(settings.importance))
        check_apart(settings.output, listed(settings.importance), model=settings.model)
        self.finished = check_unfinished(settings, self.marker)
        self.recorder = _recorder(settings)
        if self.recorder is None:
            self.of = kind_named(str(settings.kind))
            self.of.check_settings(RecordRule(), settings.storage)
        else:
            if not self.finished:
                self.recorder.check_folders()
            self.of = kind_named(self.recorder.kind)
        taken = 0 if self.recorder else self.of.rows_needed(_options(settings))
        if not (texts or self.of.own_text):
            raise InputError(
                "--text is missing: give general text, such as a .txt file or python-docs."
            )
        if settings.keep_text and not (texts and self.of.own_text):
            missing = "--text is missing" if self.of.own_text else f"{self.of.kind} keeps no text"
            raise InputError(f"--keep-text keeps rows of --text for looks, but {missing}.")
        own = (taken // 2 if texts else taken) if self.of.own_text else 0
        self._load_model()
        usual = GATHERED_BLOCK if self.of.own_text else BLOCK
        size = block_size(self.model, settings.block_size, usual)
        needed = (self.recorder and text_rows(settings)) or math.inf
        with bar("tokenizing", None, "tokens") as shown:
            self.texts: dict[str, Tensor] = {
                s.name: blocks(
                    s, self.tokenizer, size, _at_most(
                        settings.text_blocks or (max(HUB_BLOCKS, taken) if s.hub else math.inf),
                        needed,
                    ),
                    vocabulary(self.model), tick=shown.update,
                )
                for s in texts
            }  # fmt: skip
        tokens = torch.zeros(0, size, dtype=torch.int64)
        if texts:
            tokens = mix(self.texts, settings.text_weights or None, settings.text_blocks or None)
        if not self.recorder:
            draw = torch.Generator().manual_seed(settings.seed)
            kept = torch.randperm(len(tokens), generator=draw)[: taken - own if taken else None]
            unwritten = torch.zeros(own, size, dtype=torch.int64)
            tokens, self.own = torch.cat([tokens[kept], unwritten]), own
        self.tokens, self.rows = tokens, block_rows(tokens)
        if settings.importance:
            self.model = load_adapter(self.model, settings.importance, trainable=True)
        else:
            self.model = new_adapter(self.model, settings)
        self.pairs = find_pairs(self.model, settings.unheld)
        shapes = [p.shape for p in self.pairs for _ in p.names]
        self.held = self.of.bytes(shapes, settings.storage, len(tokens))
        running = self.of.bytes(shapes)
        check_space(self.output, self.held + (4 * running if settings.save_steps else 0))

    def _run(self) -> Recorded:
        if self.finished:
            clean_up_after(self.settings)
            info = store.read_info(self.output)
            store.described(info, self.output)
            size = sum(f["bytes"] for f in info["files"].values())
            return Recorded(self.output, info["kind"], info["summary"], size)
        run = self._begin()
        notes = {
            "run": run["run"], "settings": asdict(self.settings),
            "text": {n: len(b) for n, b in self.texts.items()},
        }  # fmt: skip
        if self.recorder is not None:
            self.recorder.notes = notes
            self.stop = Interruptible(self._resume_with)
            train(
                self.settings, self.model, self.rows, [self.recorder], what="general phase",
                run=run, collate=self.collate, stop=self.stop,
            )  # fmt: skip
            clean_up(self.settings)
            summary = self.recorder.summary
        else:
            summary = self._gather(notes)
        written = store.read_info(self.output)["files"] if is_main() else {}
        size = sum(f["bytes"] for f in written.values())
        return Recorded(self.output, self.of.kind, summary, size)

    def _work(self) -> tuple[dry_run.Work, Iterator[dry_run.Beside]]:
        if self.recorder is not None:
            return super()._work()
        size = self.settings.batch_size
        some = self.tokens[: max(size, LEAST_TRIED)]
        batches, tried = (-(-len(t) // size) for t in (self.tokens, some))
        said = f"gathering   {batches:,} batches of {size} rows, once, without training"
        work = dry_run.Work(said, batches, partial(self._pass, some), tried, mixed=False)
        watched = WATCHED if issubclass(self.of, Sequences) else 0
        count, length = self.own + watched, self.tokens.shape[1]
        return work, iter([self._writing(count, length)] if count else [])

    def _pass(
        self, rows: Tensor, tick: Callable[[int], Any] | None = None
    ) -> tuple[Importance, dict[str, Any]]:
        options = _options(self.settings)
        given = {k: v for k, v in options.items() if v and k != "sequences"}
        return self.of.gather(
            self.model, self.pairs, rows, batch_size=self.settings.batch_size,
            seed=self.settings.seed, tick=tick, **given,
        )  # fmt: skip

    def _gather(self, notes: dict[str, Any]) -> dict[str, Any]:
        """An importance that needs no training: sequences forward and backward."""
        options = _options(self.settings)
        began, written = time.monotonic(), None
        if self.own:
            written = self._write_own(self.own, self.tokens.shape[1])
            self.tokens[-self.own :] = written
            order = torch.Generator().manual_seed(self.settings.seed)
            self.tokens = self.tokens[torch.randperm(len(self.tokens), generator=order)]
        with bar(f"{self.of.kind} importance", len(self.tokens)) as shown:
            found, summary = self._pass(self.tokens, shown.update)
        if isinstance(found, Sequences):
            watched = self._write_own(WATCHED, self.tokens.shape[1], OTHER_SEED)
            found = found.watching(watched, self.tokens if self.settings.keep_text else written)
        importance: Importance = found.stored_as(self.settings.storage)
        norms = importance.norms()
        if not any(norms.values()):
            raise UnsupportedModelError(
                "All gradients are zero, so that nothing tells what matters: the model's "
                "predictions do not depend on the --targets, or are certain whatever it reads."
            )
        summary["own_text"] = self.own
        summary["seconds"] = round(time.monotonic() - began, 1)
        summary |= summarize_norms(norms)
        notes |= {
            "recording": {
                **{k: summary.get(k, v) for k, v in options.items()},
                "storage": self.settings.storage,
            },
            "previous": self.settings.importance, "summary": summary,
        }  # fmt: skip
        with unbroken():
            save_importance(self.output, self.model, self.pairs, importance, notes)
            if is_main():
                make_way(self.settings)  # of a recording that it overwrites
        return summary


def _at_most(*limits: float) -> int | None:
    least = min(limits)
    return None if math.isinf(least) else int(least)


def _recorder(settings: RecordSettings) -> Record | None:
    """None for a kind that is gathered without training."""
    if settings.kind and not kind_named(settings.kind).trained:
        for f in fields(settings):
            if f.name in OF_TRAINING and getattr(settings, f.name) != default_of(f):
                raise InputError(
                    f"--{f.name.replace('_', '-')} is for importance that is recorded while "
                    f"training, and {settings.kind} is gathered without: leave it out, or give "
                    "--kind factored or dense."
                )
        return None
    for name in ("sequences", "fisher_labels", "fisher_method"):
        if getattr(settings, name):
            raise InputError(
                f"--{name.replace('_', '-')} is for importance gathered without training: give its "
                "--kind too."
            )
    return Record(
        settings.output, kind=settings.kind, storage=settings.storage, preset=settings.preset,
        previous=settings.importance, overwrite=settings.overwrite or settings.resume,
        estimator=settings.estimator, xi=settings.xi, xi_relative=settings.xi_relative, quiet=True,
        max_grad_norm=settings.training.get("max_grad_norm"),
    )  # fmt: skip


def _options(settings: RecordSettings) -> dict[str, Any]:
    """The options of a kind that is gathered by passes over text."""
    return {
        "sequences": settings.sequences, "labels": settings.fisher_labels,
        "method": settings.fisher_method,
    }  # fmt: skip


class DomainPhase(_Phase[Trained]):
    """The domain phase, μ, ready to run. No `regularizers` are plain LoRA.

    Attributes:
        recorder: records the importance of this domain, to hold later ones to it.
    """

    settings: TuneSettings
    command, marker = "tune", TUNED

    def __init__(self, settings: TuneSettings) -> None:
        super().__init__()
        self.settings = settings
        self.output = Path(settings.output)
        check_name(settings.push_to_hub)
        settings = replace(settings, importance=[pinned(i) for i in settings.importance])
        self.settings = settings
        check_apart(settings.output, settings.importance, settings.record, settings.model)
        if settings.text and settings.forget_at_most is None:
            raise InputError("--text is only used with --forget-at-most: give both.")
        apart = "--peft" if settings.peft else "--corda" if settings.corda else ""
        if apart and (settings.importance or settings.record or settings.kl):
            raise InputError(
                f"{apart} is not LoRA from the base model, so nothing is held or recorded with it: "
                "leave out --importance, --record and --kl."
            )
        if settings.peft and settings.corda:
            raise InputError("--corda is a start of LoRA: leave out --peft.")
        if settings.slow and set(settings.kl) <= {ITS_PROMPTS}:
            raise InputError("--slow needs general text to look at: give --kl TEXT, or --kl own.")
        self.regularizers = regularizers(settings)
        self.recorder = _domain_recorder(settings)
        started = [p.stored.folder for p in self.regularizers if p.anchor == "nu"][-1:]
        for folder in started:
            self.settings = settings = follow_adapter(settings, folder, grows=True)
        self.finished = check_unfinished(settings, self.marker)
        if self.recorder and not self.finished:
            self.recorder.check_folders()
        self.task = load_task(
            settings.task, format=settings.task_format, limit=settings.task_rows or None
        )
        self._load_model()
        self.unwritten: list[tuple[Tensor, Tensor]] = []  # rows, and which the model will write
        self.corda: Corda | None = None
        if settings.corda:
            rows = self._general(settings.corda, CORDA_BLOCKS)
            self.corda = Corda(self.model, adapter_settings(self.model, settings), rows)
            self.model = self.corda.model
        elif started and read_config(started[0])["r"] == settings.lora_rank:
            self.model = load_adapter(
                self.model, started[0], trainable=True, advice=store.OF_MERGED
            )
        else:  # of a larger rank, it takes the recorded one over when training begins
            self.model = new_adapter(self.model, settings)
        self.pairs = [] if settings.peft else find_pairs(self.model, settings.unheld)
        self.held = 0
        for penalty in self.regularizers:
            penalty.check_pairs(self.model, self.pairs)
            self.held += penalty.stored.info["files"][store.TENSORS]["bytes"]
        self.general = None
        if settings.forget_at_most:
            rows = self._general(settings.text or MEASURED_ON, MEASURED_BLOCKS)
            watched = len(rows) // 3
            self.general = rows
            if watched > 1:  # what is watched has two rows or more
                self.regularizers[0].watch, self.general = rows[:watched], rows[watched:]
        self.rows = answer_rows(
            self.task, self.tokenizer, settings.max_length,
            vocabulary=vocabulary(self.model), context=context(self.model),
        )  # fmt: skip
        if settings.replay:
            self.rows = self._with_replay()
        needed = rows_needed(settings)
        whole = needed is None or needed >= len(self.rows)
        tokenize(self.rows, range(len(self.rows) if whole else min(FIRST, len(self.rows))))
        self.parts: list[TrainerCallback | Regularizer] = [*self.regularizers]
        if self.recorder:  # first: what a budget takes back at the end is not of the path
            self.parts.insert(0, self.recorder)
            shapes = [p.shape for p in self.pairs for _ in p.names]
            self.held += kind_named(self.recorder.kind).bytes(shapes)
        if text := [t for t in settings.kl if t != ITS_PROMPTS]:
            rows = self._general(text, HUB_BLOCKS)
            phi, every, decay = settings.kl_weight, settings.kl_every, settings.slow
            self.parts.append(
                ToSlow(rows, phi, decay, every=every)
                if decay
                else Divergence(rows, phi, every=every)
            )
        if ITS_PROMPTS in settings.kl:
            self.parts.append(OnPrompts(settings.kl_weight, settings.kl_every))
        check_space(self.output, 64 << 20)

    def _beside(self, steps: int, batch: dict[str, Tensor]) -> Iterator[dry_run.Beside]:
        if self.unwritten:
            count = sum(len(which) for _, which in self.unwritten)
            yield self._writing(count, self.unwritten[0][0].shape[1])
        for part in self.parts:
            if isinstance(part, Penalty):
                yield from (dry_run.Beside(*of) for of in part.beside(self.model, steps))
            if isinstance(part, Seldom) and not part.off:
                what = "KL, prompts" if isinstance(part, OnPrompts) else "KL"
                times = steps * self.settings.gradient_accumulation // part.every
                yield dry_run.Beside(what, times, partial(part.try_out, self.model, batch))
        if self.general is not None:  # once; it is more where the end is above the budget
            rows = self.general[: self.settings.batch_size]
            does = partial(divergence, self.model, rows, batch_size=len(rows))
            times = -(-len(self.general) // len(rows))
            yield dry_run.Beside("last check", times, does, mixed=False)

    def _run(self) -> Trained:
        if self.finished:
            clean_up_after(self.settings)
            return read_trained(self.output / self.marker)
        budget = self.settings.forget_at_most
        run = self._begin()
        for rows, which in self.unwritten:
            with without_adapter(self.model):
                rows[which] = self._write_own(len(which), rows.shape[1])
        self.stop = Interruptible(self._resume_with, at_end=budget is not None)
        trained = train(
            self.settings, self.model, self.rows, self.parts,
            what=f"domain phase, {self.task.name}", run=run, collate=self.collate,
            stop=self.stop,
        )  # fmt: skip
        if self.corda:
            self.model, self.pairs = self.corda.plain()
        if budget and self.general is not None:
            whole, kept = within_budget(self.model, self.general, budget, self.settings.batch_size)
            held = self.regularizers[0]
            trained = replace(trained, forgetting=without_nan({
                "budget": budget, "predicted": held.left,
                "measured": whole.measured.nats, "measured_se": whole.measured.se,
                "share": held.share * kept.share, "kept": kept.measured.nats,
            }))  # fmt: skip
        with unbroken():
            if is_main():
                self._write_importance(run)
                self._write(trained, run)
            clean_up(self.settings)
        return trained

    def _general(self, text: list[str], limit: int) -> Tensor:
        """At most so many rows of each kind of text, shuffled, (N, T)."""
        size, known = block_size(self.model, None, GATHERED_BLOCK), vocabulary(self.model)
        own = torch.zeros(min(limit, OWN_BLOCKS) if OWN in text else 0, size, dtype=torch.int64)
        read = [Source.parse(s) for s in text if s != OWN]
        texts = (blocks(s, self.tokenizer, size, limit, known, fixed=True) for s in read)
        rows = torch.cat([own, *texts])
        self.also_read.append(rows)
        draw = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(rows), generator=draw)
        rows = rows[order]
        if len(own):
            self.unwritten.append((rows, (order < len(own)).nonzero()[:, 0]))
        return rows

    def _with_replay(self) -> Rows:
        """The task's rows and, of all rows, a share of general text."""
        share = self.settings.replay_share
        if not 0 < share <= MOST_REPLAY:
            raise InputError(f"--replay-share must be at most {MOST_REPLAY:g}, not {share:g}.")
        count = max(1, round(len(self.rows) * share / (1 - share)))
        general = block_rows(self._general(self.settings.replay, count)).rows
        return self.rows.plus(Rows([general[i % len(general)] for i in range(count)]))

    def _held(self) -> list[dict[str, Any]]:
        """What this domain is held to, for the notes beside it."""
        return [
            {
                "importance": where, "kind": p.stored.importance.kind, "anchor": p.anchor,
                "penalty": vars(p.rule),
            }
            for where, p in zip(self.settings.importance, self.regularizers, strict=True)
        ]  # fmt: skip

    def _write_importance(self, run: dict[str, Any]) -> None:
        """The recorded importance, with the adapter as it is after all."""
        if self.recorder is None or self.recorder.found is None:
            return
        self.recorder.notes |= {
            "run": run["run"], "settings": asdict(self.settings), "task": self.task.name,
            "rows": len(self.rows), "held": self._held(),
        }  # fmt: skip
        self.recorder.write(self.model, self.recorder.found)

    def _write(self, trained: Trained, run: dict[str, Any]) -> None:
        info = {
            "hlora_version": __version__,
            "run": run["run"],
            "settings": asdict(self.settings),
            "base_model": base_of(self.model, self.pairs),
            "data": {
                "task": self.task.name,
                "rows": len(self.rows),
                "replay": self.settings.replay,
                "measured_on": self.settings.text or MEASURED_ON,
            },
            "held": self._held(),
            "versions": machine.versions(),
            "seconds": round(trained.seconds, 1),
            "steps": trained.steps,
            "forgetting": trained.forgetting,
            "log": trained.log,
        }
        with publish(self.output, TUNED) as aside:
            save_adapter(self.model, aside)
            write_json(aside / TUNED, info)
            card.write_card(aside, card.tuned(info))


_OF_A_PENALTY = (
    "phi", "forget_at_most", "anchor", "layer_weights", "normalize", "look_every",
)  # fmt: skip


def regularizers(settings: TuneSettings) -> list[Penalty]:
    """What the settings add to the task's loss: a penalty for each importance.

    Raises:
        InputError: a setting of the penalty without an importance, or not one for each.
    """
    given = {name: getattr(settings, name) for name in _OF_A_PENALTY}
    if not settings.importance:
        preset = None if settings.record else settings.preset
        for name, value in {**given, "preset": preset}.items():
            if value not in (None, [], "default"):
                raise InputError(
                    f"--{name.replace('_', '-')} belongs to the penalty, which needs --importance; "
                    "without it the adapter is plain LoRA."
                )
        return []
    count = len(settings.importance)
    phis, anchors = (_of_each(n, given.pop(n), count) for n in ("phi", "anchor"))
    of_base = {name: given.pop(name) for name in ("forget_at_most", "look_every")}
    of_others = {"look_every": None if of_base["look_every"] is None else 0}
    penalties = [
        Penalty(
            folder,
            preset=settings.preset,
            phi=phi,
            anchor=anchor,
            **given,
            **(of_base if i == 0 else of_others),
        )
        for i, (folder, phi, anchor) in enumerate(
            zip(settings.importance, phis, anchors, strict=True)
        )
    ]  # the oldest is the base model's
    _check_together([p.stored for p in penalties])
    return penalties


def _check_together(held: list[store.Stored]) -> None:
    """Refuse importances of which no model can fit all, before one is loaded.

    Raises:
        MismatchError: names two of them, and what each is of.
    """

    def of(stored: store.Stored) -> tuple[str, dict[str, tuple[float, float]]]:
        architecture = str(stored.info["base_model"]["config"].get("model_type"))
        return architecture, {n: (p["m"], p["n"]) for n, p in stored.info["pairs"].items()}

    for other in held[1:]:
        if of(held[0]) != of(other):
            said = (
                f"{s.folder} ({of(s)[0]}: {len(of(s)[1])} matrices, {targets_of(of(s)[1])})"
                for s in (held[0], other)
            )
            raise MismatchError(
                f"{' and '.join(said)} are of different target matrices or base models, so that "
                "no model can be held to both."
            )


def _of_each(name: str, given: list[Any], count: int) -> list[Any]:
    """A setting for each of so many importances, of which one was given for all, or for each."""
    if len(given) > 1 and len(given) != count:
        raise InputError(
            f"--{name} takes one value, or one for each importance: {len(given)} were given for "
            f"{count}."
        )
    return given if len(given) > 1 else (given or [None]) * count


def _domain_recorder(settings: TuneSettings) -> Record | None:
    """What records the importance of a domain while it is learned."""
    if settings.record is None:
        if settings.kind is not None:
            raise InputError("--kind is the form of what --record writes: give both.")
        return None
    recorder = Record(
        settings.record, kind=settings.kind, preset=settings.preset, quiet=True,
        overwrite=settings.overwrite or settings.resume,
        max_grad_norm=settings.training.get("max_grad_norm"),
    )  # fmt: skip
    recorder.deferred = True
    return recorder
