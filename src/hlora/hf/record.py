"""Phase ν: record how much each element of θ matters for the general task (Eq. 2-13).

    trainer.add_callback(hlora.Record("nu"))

The Trainer trains as it would without it. At the end the folder holds the adapter and Ω.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from hlora.core import store
from hlora.core.estimators import equivalent, projected
from hlora.core.importance import TRACES, Dense, Trace
from hlora.core.importance.dense import STORAGES
from hlora.core.layers import effective_number, layer_weights
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group, group
from hlora.core.presets import RECORD_PRESETS, RecordRule, choose, one_of
from hlora.core.steps import pending_scale, watchers
from hlora.errors import InputError, StoreError
from hlora.files import refuse_result, write_whole
from hlora.hf.checkpoints import checkpoint_folder
from hlora.hf.distributed import refuse_sharded, wait_for_all
from hlora.hf.peft import find_pairs

STATE = "hlora_record.safetensors"


class Record(TrainerCallback):
    """Records importance while a Trainer trains a LoRA adapter on general text.

    Gradients are taken as the optimizer receives them: after clipping and unscaling, and before
    any `Penalty` adds its own. Clipping scales down the ω of the steps that it touches; their
    share is reported, and `max_grad_norm=0` in TrainingArguments avoids it.

    Args:
        output: the folder for the adapter and its importance.
        kind: `factored` keeps the row sums and column sums of each matrix; `dense` one number for
            each element, as the paper does, a thousand times as many. None is `factored`, but
            `dense` for the presets of the paper, for a storage of dense importance, and to go on
            from a dense one.
        storage: what dense importance is written as: `fp32`, `bf16` or `int8` (logarithmic codes).
        preset: `default`, `paper` (Eq. 11-13 to the letter) or `official` (the authors' code).
        previous: an importance folder of an earlier general task, which this one adds to
            (the sum over ν in Eq. 13).
        overwrite: replace a result that the folder holds, once the new one is complete.
        quiet: do not print the summary when training ends.
        rule: fields of `hlora.core.presets.RecordRule` in place of the preset's:
            estimator, scaled, clamp, xi, xi_relative, every.

    Attributes:
        summary: after training, what was found: the share of negative ω, the largest and
            smallest ‖Ω_l‖₂, the effective number of layers under Eq. 15.

    Raises:
        InputError: an unusable setting, or an output that already holds a result.
        UnsupportedModelError: when training starts, for a model whose θ is not θ₀ + s·B·A.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        kind: str | None = None,
        storage: str = "fp32",
        preset: str | None = None,
        previous: str | Path | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        **rule: Any,
    ) -> None:
        self.quiet = quiet
        self.output = Path(output)
        self.rule: RecordRule = choose(RECORD_PRESETS, preset, **rule)
        self.preset = preset or "default"
        one_of("storage", storage, STORAGES)
        self.previous = store.load(previous) if previous is not None else None
        if kind is None:
            kind = self._usual_kind(storage)
        one_of("kind", kind, TRACES)
        if kind == "factored" and self.rule.clamp == "step":
            raise InputError(
                "Factored importance knows only sums of ω, so it cannot clamp each element after "
                "each step (preset 'official'): record with kind='dense'."
            )
        self.kind, self.storage = kind, storage
        if self.previous is not None and self.previous.importance.kind not in TRACES:
            raise InputError(
                f"{previous} holds {self.previous.importance.kind} importance, which a recording "
                "cannot add to: record without `previous` (--importance)."
            )
        if self.previous is not None and self.previous.importance.kind != kind:
            raise InputError(
                f"{previous} holds {self.previous.importance.kind} importance and this one would "
                f"be {kind}: record with kind={self.previous.importance.kind!r}, or convert it "
                "with `hlora convert`."
            )
        refuse_result(self.output, overwrite)
        self.summary: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}  # joins importance.json
        self._groups: list[Group] = []

    def _usual_kind(self, storage: str) -> str:
        if self.previous is not None and self.previous.importance.kind in TRACES:
            return self.previous.importance.kind
        return "factored" if self.preset == "default" and storage == "fp32" else "dense"

    # ------------------------------------------------------------------ in any training loop

    def start(self, model: nn.Module, optimizer: Any, *, max_grad_norm: float = 0.0) -> None:
        """Begin to record. `on_train_begin` calls this; a loop of your own may call it.

        Args:
            model: a PEFT model with one active LoRA adapter.
            optimizer: a torch optimizer, also inside accelerate's wrapper.
            max_grad_norm: the clipping threshold, to count the clipped steps.
        """
        self._pairs = find_pairs(model)
        self._groups = group(self._pairs)
        if self.previous is not None:
            self.previous.check(model, self._pairs, ranks=False)
        self._trace: Trace = TRACES[self.kind](
            self._groups, self.previous.importance.tensors() if self.previous else None
        )
        # Taken just before the first step: a Penalty may still put ν's weights in.
        self._start: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._max_grad_norm = max_grad_norm
        device = self._groups[0].device
        self._counts = {
            k: torch.zeros((), dtype=torch.float64, device=device)
            for k in ("negative", "clipped", "omega", "recorded")
        }
        self._seconds, self._began = 0.0, time.monotonic()
        self._consolidations = 0
        self._pending = 0  # steps since the last consolidation
        self._before: dict[tuple[str, ...], tuple[LowRank, Tensor, Tensor]] = {}
        self._watchers = watchers(optimizer)
        self._watchers.observe.append(self._take_gradients)
        self._watchers.after.append(self._take_step)

    def finish(self, model: nn.Module, *, write: bool = True) -> dict[str, Any]:
        """Consolidate (Eq. 13), write the folder, and return the summary."""
        self._watchers.forget(self._take_gradients, self._take_step)
        if self._pending or self._consolidations == 0:
            self._consolidate(last=True)
        importance = self._trace.importance()
        if isinstance(importance, Dense):
            importance = importance.stored_as(self.storage)
        recorded = int(self._counts["recorded"])
        self.summary = {
            "steps": recorded,
            "seconds": round(self._elapsed(), 1),
            "clipped_share": float(self._counts["clipped"]) / max(recorded, 1),
            "path_integral": float(self._counts["omega"]),
            "negative_share": self._negative_share(),
            **summarize_norms(importance.norms()),
        }
        if write:
            store.save(
                self.output,
                model,
                self._pairs,
                importance,
                {
                    "recording": {
                        "preset": self.preset,
                        "storage": self.storage,
                        **vars(self.rule),
                    },
                    **self.notes,
                    "previous": str(self.previous.folder) if self.previous else None,
                    "summary": self.summary,
                },
            )
        self._groups = []
        return self.summary

    @torch.no_grad()
    def _take_gradients(self, optimizer: Optimizer) -> None:
        scale = pending_scale(optimizer)
        squares = torch.zeros_like(self._counts["clipped"])
        for g in self._groups:
            (B, A), (gB, gA) = g.factors(), g.gradients()
            self._start.setdefault(g.names, (B, A))
            if scale is not None:
                gB, gA = gB / scale.to(gB), gA / scale.to(gA)
            if self._max_grad_norm > 0:
                squares += (gB.square().sum() + gA.square().sum()).to(squares)
            eta = _learning_rate(optimizer, g)
            if self.rule.estimator == "projected":
                gradient = projected(
                    B, A, gB, gA, g.s, eta, trains_A=g.trains_A, trains_B=g.trains_B
                )
            else:
                gradient = equivalent(B, A, gB, gA, g.s, eta)
            if self.rule.scaled:
                gradient = LowRank(g.s * gradient.P, gradient.Q)
            self._before[g.names] = (gradient, B, A)
        if self._max_grad_norm > 0:
            self._counts["clipped"] += squares.sqrt() >= 0.999 * self._max_grad_norm

    @torch.no_grad()
    def _take_step(self, optimizer: Optimizer) -> None:
        for g in self._groups:
            gradient, B0, A0 = self._before.pop(g.names)
            step = LowRank.moved(B0, A0, *g.factors(), g.s)  # Eq. 10
            self._trace.add(g, gradient, step, clamp=self.rule.clamp == "step")
        self._counts["recorded"] += 1
        self._pending += 1

    @torch.no_grad()
    def _consolidate(self, *, last: bool) -> None:
        deltas = {
            g.names: LowRank.moved(*self._start.get(g.names, g.factors()), *g.factors(), g.s)
            for g in self._groups
        }
        xi = torch.tensor(self.rule.xi, dtype=torch.float64)
        if self.rule.xi_relative:
            squares = sum(float(d.sum_of_squares().double().sum()) for d in deltas.values())
            xi = xi * squares / self._elements()
            if not xi > 0:
                raise InputError("xi is relative to how far θ moved, and it did not move at all.")
        for g in self._groups:
            self._counts["omega"] += self._trace.total(g).to(self._counts["omega"])
            self._counts["negative"] += self._trace.consolidate(
                g, deltas[g.names], xi.to(g.device, g.dtype), last=last
            ).to(self._counts["negative"])
        self._consolidations += 1
        self._pending = 0

    def _elapsed(self) -> float:
        """Seconds of training recorded so far, those before a resume included."""
        return self._seconds + time.monotonic() - self._began

    def _elements(self) -> int:
        return sum(p.shape[0] * p.shape[1] for p in self._pairs)

    def _negative_share(self) -> float | None:
        """None where every step was clamped, so that none is left to count."""
        if self.rule.clamp == "step":
            return None
        return float(self._counts["negative"]) / self._elements() / self._consolidations

    # ------------------------------------------------------------------ under a Trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        refuse_sharded(args)
        self.start(model, optimizer, max_grad_norm=args.max_grad_norm or 0.0)
        if state.global_step > 0:
            self._load_state(checkpoint_folder(args, state))

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._groups and self.rule.every == "epoch":
            self._consolidate(last=False)

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._groups and state.is_world_process_zero:
            write_whole(checkpoint_folder(args, state) / STATE, self._state())

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if not self._groups:
            return
        self.notes["log"] = [e for e in state.log_history if "loss" in e]
        summary = self.finish(model, write=state.is_world_process_zero)
        wait_for_all()
        if state.is_world_process_zero and not self.quiet:
            print(describe_summary(summary, self.output))

    def _state(self) -> bytes:
        tensors = dict(self._trace.state())
        for names, (B, A) in self._start.items():
            for name, b, a in zip(names, B, A, strict=True):
                tensors |= {f"B0.{name}": b, f"A0.{name}": a}
        counts = {k: float(v) for k, v in self._counts.items()}
        notes = {
            **counts,
            "consolidations": self._consolidations,
            "pending": self._pending,
            "seconds": self._elapsed(),
            "rule": {"kind": self.kind, **vars(self.rule)},
        }
        return save(
            {k: t.detach().cpu().contiguous() for k, t in tensors.items()},
            metadata={"hlora": json.dumps(notes)},
        )

    def _load_state(self, checkpoint: Path) -> None:
        path = checkpoint / STATE
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["hlora"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            raise StoreError(
                f"Cannot resume the recording: {path} is missing or damaged. Resume from a "
                "checkpoint that was written with Record in place, or start again."
            ) from None
        now = {"kind": self.kind, **vars(self.rule)}
        if notes["rule"] != now:
            raise InputError(
                f"Cannot resume the recording: {checkpoint} was written with {notes['rule']} and "
                f"this run has {now}."
            )
        self._trace.load_state(self._groups, tensors)
        self._consolidations, self._pending = notes["consolidations"], notes["pending"]
        self._seconds = notes["seconds"]
        for k, count in self._counts.items():
            count.fill_(notes[k])
        for g in self._groups:
            self._start[g.names] = (
                g.stack({n: tensors[f"B0.{n}"] for n in g.names}),
                g.stack({n: tensors[f"A0.{n}"] for n in g.names}),
            )


def summarize_norms(norms: dict[str, float]) -> dict[str, Any]:
    """The largest and smallest ‖Ω_l‖₂, and the effective number of layers under Eq. 15."""
    largest, smallest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    return {
        "largest_norm": {"layer": largest, "value": norms[largest]},
        "smallest_norm": {"layer": smallest, "value": norms[smallest]},
        "layers": len(norms),
        "effective_layers": effective_number(layer_weights(norms)),
    }


def _describe_gathering(summary: dict[str, Any], folder: Path | str) -> list[str]:
    if "sequences" in summary:
        return [
            f"Fisher information of {summary['sequences']} sequences on {summary['layers']} layers "
            f"in {folder}.",
        ]
    negative = summary["negative_share"]
    return [
        f"Recorded {summary['steps']} steps on {summary['layers']} layers into {folder}.",
        "negative ω: "
        + ("clamped after each step" if negative is None else f"{negative:.1%} (set to zero)")
        + f", Σω: {summary['path_integral']:.4g}",
    ]


def describe_summary(summary: dict[str, Any], folder: Path | str) -> str:
    """The summary in a few lines for people."""
    lines = [
        *_describe_gathering(summary, folder),
        *(
            f"{word} ‖Ω_l‖₂: {summary[key]['value']:.4g} ({summary[key]['layer']})"
            for word, key in (("largest", "largest_norm"), ("smallest", "smallest_norm"))
        ),
        f"effective number of layers under the softmax of Eq. 15: "
        f"{summary['effective_layers']:.1f} of {summary['layers']}",
    ]
    if summary.get("clipped_share", 0) > 0:
        lines.append(
            f"gradients were clipped in {summary['clipped_share']:.0%} of the steps, whose ω is "
            "smaller by the clipping factor (max_grad_norm=0 avoids it)"
        )
    return "\n".join(lines)


def _learning_rate(optimizer: Optimizer, group: Group) -> float:
    """η of the step to come, B's where the factors have different ones (LoRA+)."""
    wanted = group.pairs[0].B if group.trains_B else group.pairs[0].A
    for settings in optimizer.param_groups:
        if any(p is wanted for p in settings["params"]):
            return float(settings["lr"])
    raise InputError(f"The optimizer does not hold the LoRA matrices of {group.names[0]}.")
