"""One line for any Trainer: `hlora.attach(trainer, hlora.Penalty("nu"))`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from hlora.core.regularizer import Regularizer
from hlora.errors import InputError, UnsupportedModelError, one_of
from hlora.hf.badsteps import BadSteps
from hlora.hf.callbacks import Attached
from hlora.hf.checkpoints import Seal, join_train
from hlora.hf.distributed import refuse_plan
from hlora.hf.panels import Panels
from hlora.hf.peft import UNHELD, unwrap
from hlora.hf.record import Record
from hlora.hf.reference import refer_to_start
from hlora.hf.regularize import Penalty, Regularization

_OWN_LOOP = ("PPOTrainer",)
"""Trainers of TRL that are none inside: no loop, no model, no loss of Trainer's."""

_NO_OUTPUTS = (
    "GRPOTrainer", "RLOOTrainer", "A2POTrainer", "AsyncGRPOTrainer", "SDFTTrainer", "SDPOTrainer",
    "OnlineDPOTrainer",
)  # fmt: skip
"""Trainers of TRL whose `compute_loss` hands out no outputs of the model, or is never called."""

_LAYER_WISE = ("lomo", "adalomo")
"""Optimizers, beside those named `layerwise`, that step inside the backward pass."""


def attach(trainer: Any, *parts: TrainerCallback | Regularizer, unheld: str | None = None) -> None:
    """Attach recordings and regularizers to a Trainer of transformers or TRL, before it trains.

    They come before the reporters (TensorBoard, W&B), which so find `R` and `penalty` in the logs,
    and what acts on the data joins the loss. `loss` in the logs stays the task's; TensorBoard gets
    panels that show it beside what is lost (custom scalars). What cannot work is refused here,
    while the model is whole. Where a trainer compares with a reference (DPO, KTO, GRPO) and
    training starts at a recorded adapter, the reference is that start.

    Args:
        trainer: not yet trained.
        parts: `hlora.Record`, `hlora.Penalty`, or a `Regularizer` of your own. Of several
            penalties that hold to recorded adapters, training starts at the last one's.
        unheld: in place of the parts' own: `refuse` whatever is trained beside the LoRA matrices,
            or `warn` and leave it free.

    Raises:
        InputError: something else than these, one of them twice, or a setting that they cannot
            go with.
        MismatchError: the importance does not belong to the trainer's model.
        UnsupportedModelError: the trainer shards or hides its optimizer, or the model's θ is not
            θ₀ + s·B·A.
    """
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
        raise InputError(
            f"attach takes a Trainer of transformers or TRL, not {type(trainer).__name__}: in a "
            "loop of your own call Record.start or Penalty.start."
        )
    if own := _is_one_of(trainer, _OWN_LOOP):
        raise UnsupportedModelError(
            f"{own} trains a policy and a value model at once, in a loop of its own, where nothing "
            "can be recorded or held: use GRPOTrainer or RLOOTrainer."
        )
    refuse_plan(trainer.args)
    _refuse_layer_wise(trainer.args)
    handler = trainer.callback_handler
    _refuse_twice([*handler.callbacks, *parts])
    names = {c.name for c in handler.callbacks if isinstance(c, Regularization)}
    penalties = [p for p in (*handler.callbacks, *parts) if isinstance(p, Penalty)]
    starts = [p for p in penalties if p.anchor == "nu"]
    for penalty in starts:
        penalty.leads = penalty is starts[-1]
    keeping = [p for p in penalties if p.stored.importance.written is not None]
    for penalty in keeping:
        penalty.sees = penalty is keeping[0]
    callbacks: list[TrainerCallback] = []
    for part in parts:
        callback = Regularization(part) if isinstance(part, Regularizer) else part
        if not isinstance(callback, TrainerCallback):
            raise InputError(
                f"attach takes hlora.Record, hlora.Penalty or a Regularizer, not {part!r}."
            )
        if isinstance(callback, Attached):
            if unheld is not None:
                one_of("unheld", unheld, UNHELD)
                callback.unheld = unheld
            if trainer.model is not None:  # else model_init makes it when training begins
                callback.check(trainer.model, trainer.args)
        if isinstance(callback, Regularization):
            base, number = callback.name, 1
            while callback.name in names and callback not in handler.callbacks:
                number += 1
                callback.name = f"{base}-{number}"
            names.add(callback.name)
            callback.joined = True
            _refuse_without_outputs(trainer, callback.regularizer)
        if callback not in handler.callbacks:
            callbacks.append(callback)
    if not any(isinstance(c, BadSteps) for c in [*callbacks, *handler.callbacks]):
        callbacks.append(BadSteps())
    # What counts bad steps comes first: it keeps the others from writing what diverged.
    callbacks.sort(key=lambda c: not isinstance(c, BadSteps))
    if starts and trainer.model is not None:
        refer_to_start(trainer, starts[-1])
    handler.callbacks[:0] = callbacks
    if not any(isinstance(c, Seal) for c in handler.callbacks):
        handler.callbacks += [Seal(), Panels(trainer)]
    _join_the_loss(trainer)
    join_train(trainer)


def _refuse_twice(callbacks: list[Any]) -> None:
    """One importance held to twice would pull twice, and of two results in a folder one stays."""
    held: dict[str, Penalty] = {}
    written: dict[Path, Record] = {}
    for of in callbacks:
        if isinstance(of, Penalty) and held.setdefault(of.identity(), of) is not of:
            raise InputError(
                f"Two penalties hold to the importance in {of.stored.folder}, which would count "
                "twice: attach it once, with a larger phi if it is to pull more, or make a new "
                "Trainer to begin anew."
            )
        if isinstance(of, Record) and written.setdefault(of.output.resolve(), of) is not of:
            raise InputError(
                f"Two recordings write to {of.output}: attach one, or name another folder."
            )


def _refuse_layer_wise(args: Any) -> None:
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in _LAYER_WISE or "layerwise" in optimizer:
        raise UnsupportedModelError(
            f"optim={optimizer!r} takes its steps inside the backward pass, where nothing can be "
            "recorded or held: use adamw_torch."
        )


def _is_one_of(trainer: Any, names: tuple[str, ...]) -> str | None:
    """The name of the class that a trainer is, or is derived from."""
    return next((of.__name__ for of in type(trainer).__mro__ if of.__name__ in names), None)


def _refuse_without_outputs(trainer: Any, regularizer: Regularizer) -> None:
    of = _is_one_of(trainer, _NO_OUTPUTS)
    if of and regularizer.acts_on_data:
        raise _without_outputs(regularizer, of)


def _without_outputs(regularizer: Regularizer, trainer: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(regularizer).__name__} acts on the data, and {trainer} hands out no outputs of the "
        "model beside its loss: use a regularizer of the weights alone, such as hlora.Penalty."
    )


def _join_the_loss(trainer: Any) -> None:
    """Watch the loss of each micro-batch, and add what `on_forward` gives to it.

    Once, however often attached.
    """
    if getattr(trainer.compute_loss, "joined_by_hlora", False):
        return
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        callbacks = trainer.callback_handler.callbacks
        watched = next((c.steps for c in callbacks if isinstance(c, BadSteps)), None)
        if watched is None or not model.training:
            return inner(model, inputs, return_outputs=return_outputs, **kwargs)
        acting = [
            (c.regularizer, c.steps) for c in callbacks
            if isinstance(c, Regularization) and c.steps is not None and not c.regularizer.off
            and c.regularizer.acts_on_data
        ]  # fmt: skip
        more = return_outputs or bool(acting)
        inputs = dict(inputs) if acting else inputs
        got = inner(model, inputs, return_outputs=more, **kwargs)
        if acting and not isinstance(got, tuple):
            raise _without_outputs(acting[0][0], type(trainer).__name__)
        loss, outputs = got if more else (got, None)
        watched.note_loss(loss)
        loss = loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # out of the mean that is logged
        micro_batches = trainer.current_gradient_accumulation_steps
        divided = _divides_later(trainer, kwargs.get("num_items_in_batch"))
        for regularizer, steps in acting:
            R = regularizer.on_forward(unwrap(model), inputs, outputs)
            if R is not None:
                steps.forward.append((regularizer.phi, R.detach() / micro_batches))
                added = regularizer.phi * R / (1 if divided else micro_batches)
                loss = loss + (added - added.detach())  # its gradient; the value stays the task's
        return (loss, outputs) if return_outputs else loss

    compute_loss.joined_by_hlora = True  # type: ignore[attr-defined]
    trainer.compute_loss = compute_loss


def _divides_later(trainer: Any, num_items: Tensor | int | None) -> bool:
    """Whether Trainer divides the loss by the number of micro-batches after `compute_loss`.

    It does not where the loss is a sum over tokens divided by `num_items_in_batch`.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (
            trainer.model_accepts_loss_kwargs and num_items is not None
        ) or trainer.compute_loss_func is not None
    return not scaled
