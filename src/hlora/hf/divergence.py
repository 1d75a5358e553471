"""KL to the base model while tuning: on general text, or on the prompts of the task itself."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.evaluating import evaluating
from hlora.core.looks import in_turn
from hlora.core.pairs import Group
from hlora.core.regularizer import Regularizer
from hlora.errors import InputError, UnsupportedModelError, is_number, whole
from hlora.hf.limits import check_reads, check_rows
from hlora.hf.peft import unwrap, without_adapter
from hlora.hf.undropped import undropped

logger = logging.getLogger(__name__)


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) at each token, (...), from logits (..., V)."""
    p, q = (logits.float().log_softmax(-1) for logits in (before, after))
    return (p.exp() * (p - q)).sum(-1)


def by_row(before: Tensor, after: Tensor) -> Tensor:
    """The mean of each row, (N,), from logits (N, T, V).

    Row by row: a batch's log-softmax over a large vocabulary takes gigabytes.
    """
    return torch.stack([divergences(b, a).mean() for b, a in zip(before, after, strict=True)])


def predicts_text(model: nn.Module) -> bool:
    """And from `input_ids` alone: neither a classifier nor an encoder with a decoder."""
    inner = _inner(model)
    head = getattr(inner, "get_output_embeddings", lambda: True)()
    return head is not None and not getattr(inner.config, "is_encoder_decoder", False)


def refuse_no_text(model: nn.Module, what: str) -> None:
    """Refuse a model that predicts no text, or not from `input_ids` alone, for the sake of `what`.

    Raises:
        UnsupportedModelError: a classifier, or a model with an encoder and a decoder.
    """
    if not predicts_text(model):
        raise UnsupportedModelError(
            f"{what} looks at what the model predicts of text, and {type(_inner(model)).__name__} "
            "predicts none, or not from input_ids alone: leave it out. hlora.Penalty with phi "
            "looks at the weights alone."
        )


def _inner(model: nn.Module) -> Any:
    inner: Any = unwrap(model)
    return getattr(inner, "get_base_model", lambda: inner)()


_NOT_LEARNED = -100


class Seldom(Regularizer):
    """Looks at one micro-batch in `every`, which counts `every` times.

    So φ means the same however seldom it is looked at.
    """

    def __init__(self, phi: float, every: int) -> None:
        whole(f"{type(self).__name__}'s every", every, 1)
        if not (is_number(phi) and phi >= 0):
            raise InputError(
                f"{type(self).__name__}'s phi must be zero or a positive number, not {phi!r}."
            )
        self.phi, self.every, self.seen = phi, every, 0

    def check(self, model: nn.Module) -> None:
        refuse_no_text(model, type(self).__name__)

    def on_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:
        self.seen += 1
        if self.seen % self.every:
            return None
        return self.every * self.look(model, inputs, outputs)

    def look(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        raise NotImplementedError

    def try_out(self, model: nn.Module, inputs: Any) -> None:
        """One look, to be timed: forward and backward, but for what the task does anyway."""
        self.look(model, inputs, None).backward()

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor([self.seen])}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.seen = int(tensors["seen"])


class Divergence(Seldom):
    """φ · KL(base ‖ model) on rows of general text, nats per token.

    A micro-batch in `every` takes the next rows, forward once with the adapter and once without,
    both without dropout.

    Args:
        rows: (N, T) tokens.
        phi: its weight.
        batch: rows looked at together.
        every: micro-batches from one look to the next.

    Raises:
        InputError: no rows, or what is no whole number of one or more.
    """

    def __init__(self, rows: Tensor, phi: float = 1.0, batch: int = 4, every: int = 4) -> None:
        super().__init__(phi, every)
        whole(f"{type(self).__name__}'s batch", batch, 1)
        check_rows(f"{type(self).__name__}'s rows", rows, 1)
        self.rows, self.batch = rows, batch

    def check(self, model: nn.Module) -> None:
        super().check(model)
        what = f"The text of {type(self).__name__}"
        check_reads(unwrap(model), what, self.rows, self.rows.shape[1])

    def look(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        index = in_turn(self.seen // self.every, self.batch, len(self.rows))
        ids = self.rows[index].to(next(model.parameters()).device)
        with torch.no_grad(), evaluating(model):
            before = self.before(model, ids)
        return divergences(before, undropped(model, ids)).mean()

    def before(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The logits (N, T, V) to be held to."""
        with without_adapter(model):
            return model(input_ids=ids).logits


class OnPrompts(Seldom):
    """φ · KL(base ‖ model) on the prompts of the rows that are trained on, nats per token.

    Where a token that is not learned is predicted; the answers are left out, and no other text is
    needed. The mean over the prompt of each row, then over the rows, so that it is the same in one
    micro-batch and in several of as many rows each; a row without a prompt counts as zero. One
    forward pass without the adapter: the other is the task's own. So with dropout it is above zero
    at the base model too, whose own pass drops nothing.

    Args:
        phi: its weight.
        every: micro-batches from one look to the next.

    Raises:
        InputError: `every` is no whole number of one or more; while training, a trainer that hands
            out no labels.
    """

    def __init__(self, phi: float = 1.0, every: int = 1) -> None:
        super().__init__(phi, every)
        self._met: Tensor | None = None

    def look(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        logits = getattr(outputs, "logits", None)
        if "labels" not in inputs or logits is None:
            raise InputError(
                "KL on the prompts needs the labels beside the logits, and this trainer takes them "
                "away (label smoothing does): leave that out, or give general text."
            )
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        prompt = inputs["labels"][:, 1:] == _NOT_LEARNED
        if mask is not None:
            prompt = prompt & mask[:, 1:].bool()
        self._met = prompt.any() if self._met is None else self._met | prompt.any()
        with torch.no_grad(), evaluating(model), without_adapter(model):
            before = model(input_ids=ids, attention_mask=mask).logits
        return torch.stack(
            [
                divergences(b[here], a[here]).sum() / here.sum().clamp(min=1)
                for b, a, here in zip(before[:, :-1], logits[:, :-1], prompt, strict=True)
            ]
        ).mean()

    def try_out(self, model: nn.Module, inputs: Any) -> None:
        device = next(model.parameters()).device
        of = {k: v.to(device) for k, v in inputs.items() if k != "labels"}
        with torch.no_grad(), evaluating(model), without_adapter(model):
            model(**of)

    def at_end(self, groups: list[Group]) -> None:
        if self._met is not None and not self._met:
            logger.warning(
                "KL on the prompts held nothing: no row had a prompt, tokens that are not learned. "
                "Take KL on general text (Divergence), or rows with prompt and completion."
            )
