"""The method as callbacks of transformers' Trainer (and TRL's).

    hlora.attach(trainer, hlora.Record("nu"))                 # the general phase
    hlora.attach(trainer, hlora.Penalty("nu", phi=0.01))      # the domain phase

`Record` and `Penalty` adapt `core.Recorder` and `core.Quadratic`, which know nothing of a trainer.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback

from hlora.core import store
from hlora.core.importance import Importance
from hlora.core.kinds import kind_named
from hlora.core.pairs import Group, Pair, group
from hlora.core.presets import PENALTY_PRESETS, RECORD_PRESETS, PenaltyRule, RecordRule, choose
from hlora.core.quadratic import Anchor, Quadratic
from hlora.core.recorder import Recorder, describe_summary
from hlora.core.regularizer import Regularizer
from hlora.core.steps import Steps, steps_of
from hlora.errors import InputError, StoreError, UnsupportedModelError
from hlora.files import refuse_result, write_whole
from hlora.hf.distributed import refuse_sharded, wait_for_all
from hlora.hf.peft import base_of, find_pairs, save_adapter, starts_at_base

logger = logging.getLogger(__name__)

ANCHORS = ("nu", "base")
_NEVER = (
    "The optimizer never took a step that hlora could see, so nothing was recorded or held: this "
    "optimizer or launcher is not supported. Train with a torch optimizer such as adamw_torch."
)
WEAK = 1e-3
"""Below this share of the task's gradient a penalty does nothing."""


def checkpoint_folder(args: Any, state: Any) -> Path:
    """The checkpoint of the present step: about to be written, or just resumed from."""
    given = args.resume_from_checkpoint
    if isinstance(given, str) and given.rstrip("/").endswith(f"-{state.global_step}"):
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class Record(TrainerCallback):
    """Records importance while a Trainer trains a LoRA adapter on general text (Eq. 2-13).

    The Trainer trains as it would without it. Gradients are taken as the optimizer receives them:
    after clipping and unscaling, and before any penalty adds its own. Clipping scales down the ω
    of the steps that it touches; their share is reported, and `max_grad_norm=0` in
    TrainingArguments avoids it. When training ends the output holds the adapter and Ω. Nothing is
    read or written before training begins.

    Args:
        output: the folder for the adapter and its importance.
        kind: `factored` keeps the row sums and the column sums of each matrix; `dense` one number
            for each element, as the paper does, a thousand times as many. None is the preset's
            (`factored` by default, `dense` for the paper's), and `dense` for a storage of dense
            importance or on top of a dense `previous`.
        storage: what dense importance is written as: `fp32`, `bf16` or `int8` (logarithmic codes).
        preset: `default`, `paper` (Eq. 11-13 to the letter) or `official` (the authors' code; it
            also turns gradient clipping off).
        previous: an importance folder of an earlier general task, which this one adds to
            (the sum over ν in Eq. 13).
        overwrite: replace a result that the folder holds, once the new one is complete.
        quiet: do not print the summary when training ends.
        rule: fields of `hlora.core.presets.RecordRule` in place of the preset's:
            estimator, scaled, clamp, xi, xi_relative, every, max_grad_norm.

    Attributes:
        summary: after training, what was found: the share of negative ω, the largest and
            smallest ‖Ω_l‖₂, the effective number of layers under Eq. 15.
        notes: join `importance.json`.

    Raises:
        InputError: an unusable setting; when training starts, an output that holds a result.
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
        self.output = Path(output)
        self.previous = None if previous is None else Path(previous)
        self.preset, self.storage = preset or "default", storage
        self.overwrite, self.quiet = overwrite, quiet
        if kind is None and storage != "fp32":
            kind = "dense"
        self._kind_given = kind is not None
        self.rule: RecordRule = choose(RECORD_PRESETS, preset, kind=kind, **rule)
        of = kind_named(self.rule.kind)
        of.check_settings(self.rule, storage)
        if not of.trained:
            raise InputError(
                f"{of.kind} importance is not gathered by training: use the command `hlora record "
                f"--kind {of.kind}`."
            )
        self.summary: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self._recorder: Recorder | None = None

    @property
    def kind(self) -> str:
        return self.rule.kind

    def check_folders(self) -> store.Stored | None:
        """Read the earlier importance and refuse an unusable output, before any work is done.

        Raises:
            InputError, StoreError: what is wrong with either folder.
        """
        refuse_result(self.output, self.overwrite)
        if self.previous is None:
            return None
        earlier = store.load(self.previous)
        held = earlier.importance
        if not held.trained:
            raise InputError(
                f"{self.previous} holds {held.kind} importance, which a recording cannot add to: "
                "record without `previous` (--importance)."
            )
        if not self._kind_given:
            self.rule = replace(self.rule, kind=held.kind)
            held.check_settings(self.rule, self.storage)
        if held.kind != self.rule.kind:
            raise InputError(
                f"{self.previous} holds {held.kind} importance and this one would be "
                f"{self.rule.kind}: record with kind={held.kind!r}, or convert it with "
                "`hlora convert`."
            )
        return earlier

    # ---------------------------------------------------------------- in any training loop

    def start(self, model: nn.Module, optimizer: Any, *, max_grad_norm: float = 0.0) -> None:
        """Begin to record. `on_train_begin` calls this; a loop of your own may call it.

        Args:
            model: a PEFT model with one active LoRA adapter.
            optimizer: a torch optimizer, also inside accelerate's wrapper.
            max_grad_norm: the clipping threshold, to count the clipped steps.
        """
        self.stop()
        earlier = self.check_folders()
        pairs = find_pairs(model)
        if earlier is not None:
            earlier.check(base_of(model, pairs), pairs, ranks=False)
        self._pairs = pairs
        self._recorder = Recorder(
            group(pairs), self.rule, earlier=earlier.importance if earlier else None,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
        self._steps = steps_of(optimizer)
        self._recorder.attach(self._steps)

    def stop(self) -> None:
        """Stop recording, and forget what was recorded."""
        if self._recorder is not None:
            self._recorder.detach(self._steps)
        self._recorder = None

    def collect(self) -> Importance:
        """Consolidate (Eq. 13) and fill in `summary`, on every process; `write` then saves."""
        if self._recorder is None:
            raise InputError("Nothing is being recorded: call start(model, optimizer) first.")
        importance, self.summary = self._recorder.collect()
        self.stop()
        return importance.stored_as(self.storage)

    def write(self, model: nn.Module, importance: Importance) -> None:
        """Write the folder: the adapter as it is now, and the importance. One process calls it."""
        recording = {"preset": self.preset, "storage": self.storage, **vars(self.rule)}
        notes = {
            "recording": recording,
            **self.notes,
            "previous": str(self.previous) if self.previous else None,
            "summary": self.summary,
        }
        save_importance(self.output, model, self._pairs, importance, notes)

    def finish(self, model: nn.Module) -> dict[str, Any]:
        """End a loop of one process: collect, write, and return the summary."""
        self.write(model, self.collect())
        return self.summary

    # ---------------------------------------------------------------- under a Trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        refuse_sharded(args)
        if self.rule.max_grad_norm is not None:
            args.max_grad_norm = self.rule.max_grad_norm
        self._from = state.global_step
        self.start(model, optimizer, max_grad_norm=args.max_grad_norm or 0.0)
        if state.global_step > 0 and self._recorder is not None:
            self._recorder.load_state(checkpoint_folder(args, state) / RECORD_STATE)

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._recorder is not None and self.rule.every == "epoch":
            self._recorder.consolidate()

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._recorder is not None and state.is_world_process_zero:
            write_whole(checkpoint_folder(args, state) / RECORD_STATE, self._recorder.state())

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self._recorder is None:
            return
        self.notes["log"] = [e for e in state.log_history if "loss" in e]
        if state.global_step > self._from and not self._steps.seen:
            self.stop()
            raise UnsupportedModelError(_NEVER)
        importance = self.collect()
        if state.is_world_process_zero:
            self.write(model, importance)
        wait_for_all()
        if state.is_world_process_zero and not self.quiet:
            print(f"{describe_summary(importance.kind, self.summary)}\nWritten to {self.output}.")


RECORD_STATE = "hlora_record.safetensors"


def save_importance(
    folder: Path, model: nn.Module, pairs: list[Pair], importance: Importance, notes: dict[str, Any]
) -> dict[str, Any]:
    """Write the model's adapter with an importance of it. Returns what `importance.json` holds."""
    return store.save(
        folder, lambda aside: save_adapter(model, aside), base_of(model, pairs), pairs, importance,
        notes,
    )  # fmt: skip


class Regularization(TrainerCallback):
    """A regularizer under a Trainer: started, logged, and saved with its φ in checkpoints.

    Trainer's own `loss` stays the task's. At each logging step `R` (Eq. 15), `penalty` (Σ φ R) and
    `total_loss`, each a mean over the steps since the last one, and `penalty_grad_ratio` (the norm
    of the added gradient over the task's) join the logs, summed over all regularizers.

    Args:
        regularizer: see `hlora.core.regularizer`.
        name: tells several in one run apart.
    """

    def __init__(self, regularizer: Regularizer | None = None, name: str = "penalty") -> None:
        self._regularizer, self.name = regularizer, name
        self._steps: Steps | None = None
        self._groups: list[Group] = []

    @property
    def regularizer(self) -> Regularizer:
        if self._regularizer is None:
            raise InputError("The penalty has not started: call start(model, optimizer) first.")
        return self._regularizer

    @property
    def phi(self) -> float | Tensor:
        """φ, read at every step: it may change while training."""
        return self.regularizer.phi

    @phi.setter
    def phi(self, value: float | Tensor) -> None:
        self.regularizer.phi = value

    @property
    def running(self) -> bool:
        return self._steps is not None

    # ---------------------------------------------------------------- in any training loop

    def start(self, model: nn.Module, optimizer: Any, *, fresh: bool = True) -> None:
        """Begin to regularize. `on_train_begin` calls this; a loop of your own may call it.

        Args:
            model: a PEFT model with one active LoRA adapter.
            optimizer: a torch optimizer, also inside accelerate's wrapper.
            fresh: training starts here; otherwise it is resumed and no weight is touched.
        """
        self.finish()
        self._groups = self.prepare(model, fresh=fresh)
        self._steps = steps_of(optimizer)
        self._steps.add(self.regularizer, self._groups)

    def prepare(self, model: nn.Module, *, fresh: bool) -> list[Group]:
        """The groups to regularize; a subclass makes its regularizer here."""
        return group(find_pairs(model))

    def finish(self) -> None:
        """Stop regularizing."""
        if self._steps is not None:
            self._steps.drop(self.regularizer)
        self._steps, self._groups = None, []

    def tally(self, R: Tensor, share: float) -> None:
        """Count a micro-batch's R in the logs."""
        if self._steps is not None:
            self._steps.tally(self.regularizer, R, share)

    @torch.no_grad()
    def value(self) -> Tensor:
        """R at the present weights; 0 where it depends on data."""
        pull = self.regularizer.before_step(self._groups)
        return torch.zeros(()) if pull is None else pull.R

    # ---------------------------------------------------------------- under a Trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        refuse_sharded(args)
        fresh = state.global_step == 0
        self._from = state.global_step
        self.start(model, optimizer, fresh=fresh)
        if not fresh:
            self._load_state(checkpoint_folder(args, state) / self._state_file)

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._steps is not None:
            every = max(int(state.logging_steps or 1), 1)
            self._steps.measure = (state.global_step + 1) % every == 0

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if self._steps is None or logs is None or "loss" not in logs:
            return
        entry = self._steps.report()
        if entry is None:  # another regularizer of this run has told it
            return
        entry["total_loss"] = logs["loss"] + entry["penalty"]
        logs.update(entry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entry)

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._steps is not None and state.is_world_process_zero:
            tensors = {k: t.detach().cpu().contiguous() for k, t in self.state_tensors().items()}
            content = save(tensors, metadata={"hlora": json.dumps({"phi": float(self.phi)})})
            write_whole(checkpoint_folder(args, state) / self._state_file, content)

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._steps is None:
            return
        ratio, phi, reached = self._steps.largest_ratio, float(self.phi), self._steps.seen
        self.finish()
        if state.global_step > self._from and not reached:
            raise UnsupportedModelError(_NEVER)
        if 0 < ratio < WEAK and phi > 0:
            logger.warning(
                "The penalty did next to nothing: its gradient was at most %.1e of the task's. "
                "Raise phi (now %g)%s.", ratio, phi, self.remedy(),
            )  # fmt: skip

    @property
    def _state_file(self) -> str:
        return f"hlora_{self.name}.safetensors"

    def _load_state(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["hlora"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            self.load_tensors(tensors)
            self.phi = float(notes["phi"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            raise StoreError(
                f"Cannot resume: {path}, which holds the penalty's state, is missing or damaged. "
                "Resume from a checkpoint that was written with the penalty in place, or start "
                "again."
            ) from None

    # ---------------------------------------------------------------- for subclasses

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside φ."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """From a checkpoint."""

    def remedy(self) -> str:
        """What else helps a penalty that is too weak."""
        return ""


class Penalty(Regularization):
    """Adds φ · Σ_l w_l Σ_i Ω_i (θ_i − θ_i^ν)² to what a Trainer minimizes (Eq. 14-16).

    The penalty does not depend on the batch, so its gradient is added once per optimizer step, in
    closed form, after accumulation and clipping: the same for SFT and DPO and on every rank.

    Args:
        importance: an importance folder.
        phi: φ of Eq. 16; 0.01 on normalized importance unless the preset says otherwise. The
            attribute may be set while training.
        preset: `default`, `paper` (Eq. 14-16 to the letter) or `official` (the authors' code).
        anchor: `nu` starts from the recorded adapter and holds θ to it; `base` starts from the
            base model and holds θ to that, the recorded adapter serving for its importance only.
        rule: fields of `hlora.core.presets.PenaltyRule` in place of the preset's:
            normalize, layer_weights, softmax_scale, apart.

    Raises:
        InputError, StoreError: an unusable setting or importance folder.
        MismatchError: when training starts, for a model that the importance does not belong to.
    """

    def __init__(
        self,
        importance: str | Path,
        *,
        phi: float | None = None,
        preset: str | None = None,
        anchor: str = "nu",
        **rule: Any,
    ) -> None:
        super().__init__()
        if anchor not in ANCHORS:
            raise InputError(f"anchor must be one of {', '.join(ANCHORS)}, not {anchor!r}.")
        self.rule: PenaltyRule = choose(PENALTY_PRESETS, preset, phi=phi, **rule)
        self.anchor = anchor
        self.stored = store.load(importance)

    @property
    def phi(self) -> float | Tensor:
        return self.rule.phi if self._regularizer is None else self._regularizer.phi

    @phi.setter
    def phi(self, value: float | Tensor) -> None:
        if not isinstance(value, Tensor):
            self.rule = replace(self.rule, phi=float(value))  # refuses what is no φ
        if self._regularizer is not None:
            self._regularizer.phi = value

    def prepare(self, model: nn.Module, *, fresh: bool) -> list[Group]:
        pairs = find_pairs(model)
        self.stored.check(base_of(model, pairs), pairs, ranks=self.anchor == "nu")
        groups = group(pairs)
        self._keeps_anchor = self.anchor == "base" and not starts_at_base(model)
        anchor = self._find_anchor(model, groups, fresh=fresh)
        self._regularizer = Quadratic(self.stored.importance, groups, anchor, self.rule)
        return groups

    def _find_anchor(self, model: nn.Module, groups: list[Group], *, fresh: bool) -> Anchor:
        """B and A of the anchor by group; for `nu` an untrained adapter takes ν's weights."""
        anchor = {}
        moved = False
        for g in groups:
            B, A = g.factors()
            if self.anchor == "base":
                # Where the initialization changed θ₀, the start and not B = 0 is the base model.
                anchor[g.names] = (B, A) if self._keeps_anchor else (torch.zeros_like(B), A)
                continue
            nu = {n: self.stored.factors[n] for n in g.names}
            B_nu = g.stack({n: f[0] for n, f in nu.items()})
            A_nu = g.stack({n: f[1] for n, f in nu.items()})
            anchor[g.names] = (B_nu, A_nu)
            if fresh:
                if not B.any():
                    g.set_factors(B_nu, A_nu)
                else:
                    moved |= not (torch.equal(B, B_nu) and torch.equal(A, A_nu))
        if moved:
            logger.warning(
                "The adapter is neither new nor the one in %s: training starts where it is and is "
                "pulled towards θ^ν. Start from a new adapter, or from that folder.",
                self.stored.folder,
            )
        return anchor

    def state_tensors(self) -> dict[str, Tensor]:
        """θ^ν is in its folder; a base that the initialization moved is nowhere else."""
        if self.anchor != "base":
            return {}
        assert isinstance(self._regularizer, Quadratic)
        return {
            f"{which}.{name}": t
            for names, both in self._regularizer.anchor.items()
            for which, stacked in zip("BA", both, strict=True)
            for name, t in zip(names, stacked, strict=True)
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        if not self._keeps_anchor:
            return
        assert isinstance(self._regularizer, Quadratic)
        for g in self._groups:
            B, A = (g.stack({n: tensors[f"{which}.{n}"] for n in g.names}) for which in "BA")
            self._regularizer.anchor[g.names] = (B, A)

    def remedy(self) -> str:
        return "" if self.rule.normalize else ", or normalize the importance (normalize=True)"
