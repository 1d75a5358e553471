"""Text that the model writes itself: what it knows, without a data set."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hlora.core.evaluating import evaluating
from hlora.core.finite import check_predictions
from hlora.core.sampling import drawn
from hlora.data.encode import check_known, leading, render_chat, separator
from hlora.data.tasks import batches
from hlora.errors import InputError
from hlora.hf.limits import vocabulary

logger = logging.getLogger(__name__)

_MARK = "\x00"
OWN = "the model's own text"
TRIED = 8
"""Tokens that are written to know how long it takes."""
TOGETHER = 96
"""Rows in a batch: the usual 72 chats, and the usual 72 other texts, are one each."""


@torch.no_grad()
def own_text(
    model: nn.Module,
    tokenizer: Any,
    count: int,
    length: int,
    *,
    seed: int = 0,
    batch_size: int = TOGETHER,
    tick: Callable[[int], None] | None = None,
) -> Tensor:
    """Sequences sampled at temperature 1, (count, length) tokens.

    Half of them are documents, and half, where the tokenizer has a chat template, begin as a user's
    turn, so that the model writes a question and its answer; none, if what a chat begins with fills
    more than half of a row. A sequence goes on after an
    end-of-text token, with another document. What a document is written behind stays before it
    only where the tokenizer puts it before any text: a model that reads a first token of its own
    is another model, in which little is forgotten that the other forgets.

    Raises:
        DivergedError: the model's predictions are not finite.
    """
    plain, chats = _starts(model, tokenizer)
    half = count // 2 if 0 < len(chats) <= length // 2 else 0
    unread = 0 if leading(tokenizer) else 1
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    written = []
    with evaluating(model):
        for start, n, cut in ((plain, count - half, unread), (chats, half, 0)):
            for part in batches(n, batch_size):
                rows = torch.tensor([start] * (part.stop - part.start))
                written.append(_continue(model, rows, length + cut, generator)[:, cut:])
                if tick:
                    tick(len(rows))
    return torch.cat(written)


def trial(
    model: nn.Module, tokenizer: Any, count: int, length: int, batch_size: int = TOGETHER
) -> tuple[Callable[[], Any], float]:
    """What writes a little of (count, length) tokens, and how many rows' worth of work that is."""
    rows, steps = min(count, batch_size), min(TRIED, length - 1)
    plain, _ = _starts(model, tokenizer)
    # Without a cache all that is there is read for each token: half of it, on average.
    begun = 1 if _cache_of(model) else max(1, length // 2)
    ids = torch.full((rows, begun), plain[0])

    @torch.no_grad()
    def once() -> None:
        generator = torch.Generator(device=next(model.parameters()).device)
        with evaluating(model):
            _continue(model, ids, begun + steps, generator)

    return once, rows * steps / (length - 1)


def _continue(model: nn.Module, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Rows (b, t) continued to (b, length)."""
    ids = ids[:, :length].to(generator.device)
    seen, cache = ids, _cache_of(model)  # it is filled in place
    while ids.shape[1] < length:
        out = model(input_ids=seen, **cache) if cache else model(input_ids=ids, use_cache=False)
        logits = out.logits[:, -1].float()
        check_predictions(model, logits)
        seen = drawn(logits, generator)[:, None]
        ids = torch.cat([ids, seen], dim=1)
    return ids.cpu()


def _cache_of(model: nn.Module) -> dict[str, Any]:
    """What the model's forward is given to keep its past in; nothing where it takes no such cache.

    Newer transformers have another word for it; Mamba and RWKV keep a state of their own.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    for name in ("cache", "past_key_values"):
        if name in inspect.signature(inner.forward).parameters:
            config = inner.config.get_text_config(decoder=True)
            return {name: DynamicCache(config=config), "use_cache": True}
    return {}


def _starts(model: nn.Module, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before a document, and before a chat; the model knows them all."""
    plain, chats = [separator(tokenizer)], _chat_start(tokenizer)
    check_known(plain + chats, OWN, vocabulary(model))
    return plain, chats


def _chat_start(tokenizer: Any) -> list[int]:
    """The tokens before a user's first words; none without a template that takes a user's turn."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turn = [{"role": "user", "content": _MARK}]
    try:
        text = render_chat(tokenizer, turn, OWN)
    except InputError as error:
        logger.warning("%s The model writes documents only.", error)
        return []
    return tokenizer(text.partition(_MARK)[0], add_special_tokens=False)["input_ids"]
