"""The general phase as a callback: `hlora.attach(trainer, hlora.Record("nu"))`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hlora.core import store
from hlora.core.importance import Importance
from hlora.core.kinds import kind_named
from hlora.core.layers import unreached
from hlora.core.pairs import Pair, check_held, digest, group
from hlora.core.presets import RECORD_PRESETS, RecordRule, choose
from hlora.core.recorder import Recorder, describe_summary
from hlora.errors import InputError, in_short, one_of
from hlora.files import publish, refuse_result, write_whole
from hlora.hf.callbacks import Attached
from hlora.hf.distributed import is_main, wait_for_all
from hlora.hf.hub import located
from hlora.hf.peft import UNHELD, base_of, find_pairs, save_adapter, whole_adapter

logger = logging.getLogger(__name__)

RECORD_STATE = "hlora_record.safetensors"


class Record(Attached):
    """Records importance while a Trainer trains a LoRA adapter on general text (Eq. 2-13).

    The Trainer trains as it would without it. Gradients are taken as the optimizer receives them:
    after clipping and unscaling, and before any penalty adds its own. Clipping scales down the ω
    of the steps that it touches; their share is reported, and `max_grad_norm=0` in
    TrainingArguments avoids it. When training ends the output holds the adapter and Ω. Nothing is
    written before training begins.

    Args:
        output: the folder for the adapter and its importance.
        kind: `factored` keeps the row sums and the column sums of each matrix; `dense` one number
            for each element, as the paper does, a thousand times as many. None is the preset's
            (`factored` by default, `dense` for the paper's), and `dense` for a storage of dense
            importance or on top of a dense `previous`.
        storage: what dense importance is written as: `fp32`, `bf16` or `int8` (logarithmic codes).
        preset: `default`, `paper` (Eq. 11-13 to the letter) or `official` (the authors' code; it
            also turns gradient clipping off).
        previous: an importance folder of an earlier general task, or its name on the hub, which
            this one adds to (the sum over ν in Eq. 13).
        overwrite: replace a result that the folder holds, once the new one is complete.
        quiet: do not print the summary when training ends.
        unheld: `refuse` whatever is trained beside the LoRA matrices (DoRA's magnitudes, biases,
            embeddings, other modules), or `warn` and leave it free: no importance covers it.
        rule: fields of `hlora.core.presets.RecordRule` in place of the preset's:
            estimator, scaled, clamp, xi, xi_relative, every, max_grad_norm.

    Attributes:
        summary: after training, what was found: the share of negative ω, the largest and
            smallest ‖Ω_l‖₂, the effective number of layers under Eq. 15.
        notes: join `importance.json`.
        deferred: leave the writing to the caller, who does `write(model, found)`.
        found: the importance after training, where it is deferred.

    Raises:
        InputError: an unusable setting; when training starts, an output that holds a result.
        UnsupportedModelError: when training starts, for a model whose θ is not θ₀ + s·B·A.
    """

    state_file = RECORD_STATE

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
        unheld: str = "refuse",
        **rule: Any,
    ) -> None:
        self.output = Path(output)
        self.previous = previous
        self.preset, self.storage = preset or "default", storage
        self.overwrite, self.quiet = overwrite, quiet
        one_of("unheld", unheld, UNHELD)
        self.unheld = unheld
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
        self.deferred = False
        self.found: Importance | None = None
        self._recorder: Recorder | None = None
        self._pairs: list[Pair] = []
        self._earlier: store.Stored | None = None
        self._wrote = False  # a second train() replaces the first one's result

    @property
    def kind(self) -> str:
        return self.rule.kind

    def check_folders(self) -> store.Stored | None:
        """Read the earlier importance and refuse an unusable output, before any work is done.

        Raises:
            InputError, StoreError: what is wrong with either folder.
        """
        refuse_result(self.output, self.overwrite or self._wrote)
        if self.previous is None:
            return None
        self._earlier = earlier = self._earlier or store.load(located(self.previous))
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
        pairs = self._pairs = self._checked(model, earlier)
        groups = group(pairs)
        check_held(optimizer, groups)
        self._recorder = Recorder(
            groups, self.rule, earlier=earlier.importance if earlier else None,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
        self._recorder.attach(self.follow(optimizer, model, pairs))

    def _checked(self, model: nn.Module, earlier: store.Stored | None) -> list[Pair]:
        pairs = find_pairs(model, self.unheld)
        if earlier is not None:
            earlier.check(base_of(model, pairs), pairs, ranks=False)
        return pairs

    def stop(self) -> None:
        """Stop recording, and forget what was recorded."""
        if self._recorder is not None:
            assert self.steps is not None
            self._recorder.detach(self.steps)
        self._recorder = None

    def collect(self) -> Importance:
        """Consolidate (Eq. 13) and fill in `summary`, on every process; `write` then saves."""
        if self._recorder is None:
            raise InputError("Nothing is being recorded: call start(model, optimizer) first.")
        importance, self.summary = self._recorder.collect()
        self.stop()
        return importance.stored_as(self.storage)

    def write(self, model: nn.Module, importance: Importance) -> None:
        """Write the folder: the adapter as it is now, and the importance.

        Every process calls it, and the first one writes. Of the model nothing is kept.
        """
        rule = {k: v for k, v in vars(self.rule).items() if k != "kind"}
        recording = {"preset": self.preset, "storage": self.storage, **rule}
        notes = {
            "recording": recording,
            **self.notes,
            "previous": str(self.previous) if self.previous else None,
            "summary": self.summary,
        }
        pairs, self._pairs = self._pairs or find_pairs(model, self.unheld), []
        save_importance(self.output, model, pairs, importance, notes)
        self._wrote = True

    def finish(self, model: nn.Module) -> dict[str, Any]:
        """End a loop: collect, write, and return the summary. Every process calls it."""
        self.write(model, self.collect())
        wait_for_all()
        return self.summary

    # ---------------------------------------------------------------- under a Trainer

    def check(self, model: nn.Module, args: Any) -> None:
        self._check_arguments(args)
        self._checked(model, self.check_folders())

    @staticmethod
    def _check_arguments(args: Any) -> None:
        if args.load_best_model_at_end:
            raise InputError(
                "load_best_model_at_end goes back to earlier weights when training ends, and the "
                "importance would be that of the whole path: record without it."
            )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        fresh = self.begin(args, state)
        self._check_arguments(args)
        if self.rule.max_grad_norm is not None:
            self._clipping = args.max_grad_norm
            args.max_grad_norm = self.rule.max_grad_norm
        self.start(model, optimizer, max_grad_norm=args.max_grad_norm or 0.0)
        if not fresh and self._recorder is not None:
            path = self.resumed_from(args, state) / RECORD_STATE
            self.check_bound(self._recorder.load_state(path), self._recorder.groups, path)
            # Trainer saves before the epoch's end, and does not come back to it.
            if self._recorder.pending and float(state.epoch or 0.5).is_integer():
                self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._recorder is not None and self.rule.every == "epoch":
            self._recorder.consolidate()

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._recorder is None:
            return
        weights = digest(self._recorder.groups)  # every process
        if state.is_world_process_zero:
            write_whole(self.written_to(args, state) / RECORD_STATE, self._recorder.state(weights))

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self._recorder is None:
            return
        if self.rule.max_grad_norm is not None:
            args.max_grad_norm = self._clipping
        self.notes["log"] = [e for e in state.log_history if "loss" in e]
        self.check_reached(args, state)
        importance = self.collect()
        if self.deferred:
            self.found = importance
            return
        self.write(model, importance)
        wait_for_all()
        if state.is_world_process_zero and not self.quiet:
            print(f"{describe_summary(importance.kind, self.summary)}\nWritten to {self.output}.")


def warn_of_unreached(importance: Importance) -> None:
    """Name the parts of the model that the importance leaves without protection."""
    parts = unreached(importance.norms())
    if parts:
        logger.warning(
            "The general text never reached %s: nothing protects what is trained there. Train no "
            "LoRA on it (target_modules, exclude_modules), or record on data that reaches it.",
            in_short(parts),
        )  # fmt: skip


def save_importance(
    folder: Path, model: nn.Module, pairs: list[Pair], importance: Importance, notes: dict[str, Any]
) -> dict[str, Any]:
    """Write the model's adapter with an importance of it. Returns what `importance.json` holds.

    Every process calls it, and the first one writes: to it this is returned. What the general text
    never reached is named in a warning.
    """
    adapter, base = whole_adapter(model), base_of(model, pairs)
    if not is_main():
        return {}
    warn_of_unreached(importance)
    with publish(folder, store.MARKER) as aside:
        save_adapter(model, aside, adapter)
        return store.write(aside, importance, store.about(base, pairs) | notes)
