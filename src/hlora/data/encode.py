"""Text as token ids, in the one way that training and evaluation share.

As lm-evaluation-harness and the models' own training do, a text gets the special tokens that its
tokenizer adds (a Gemma without its <bos> is another model), unless it starts with one already.
"""

from __future__ import annotations

from typing import Any

from hlora.data.sandbox import ChatSandbox
from hlora.errors import InputError, one_line

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
"""What chat models whose own special tokens all mark turns were trained with before."""


def encode(
    tokenizer: Any, text: str, where: str, vocabulary: int | None = None, *, special: bool = True
) -> list[int]:
    """The token ids of a text.

    Args:
        where: the file and row, for the error.
        vocabulary: how many tokens the model knows; None does not check.
        special: with the special tokens that the tokenizer adds.

    Raises:
        InputError: the tokenizer cannot take the text, or the model not its tokens.
    """
    start = tokenizer.decode(prefix_token(tokenizer)) if special else ""
    try:
        ids = tokenizer(
            text, add_special_tokens=special and not text.startswith(start or "\0"), verbose=False
        )["input_ids"]
    except Exception as error:  # any tokenizer may raise anything
        said = " ".join(f"{type(error).__name__} {error}".split())[:160]
        said = said.encode("utf-8", "backslashreplace").decode("utf-8")
        raise InputError(f"{where}: the tokenizer cannot take this text ({said}).") from None
    if vocabulary is not None:
        check_known(ids, where, vocabulary)
    return ids


def check_known(ids: list[int], where: str, vocabulary: int) -> None:
    """Refuse tokens that the model does not know.

    Raises:
        InputError: names the largest.
    """
    if ids and max(ids) >= vocabulary:
        raise InputError(
            f"{where}: the tokenizer gives the token {max(ids)}, and the model knows "
            f"{vocabulary:,}: the two do not belong together."
        )


def prefix_token(tokenizer: Any) -> int:
    """What stands before a text that has nothing before it.

    Raises:
        InputError: the tokenizer has no such token.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise InputError(
            "The tokenizer names neither a beginning- nor an end-of-text token: set bos_token or "
            "eos_token in its tokenizer_config.json."
        )
    return eos if bos is None else bos


def leading(tokenizer: Any) -> list[int]:
    """The beginning-of-text token as a list, empty where the tokenizer adds none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def separator(tokenizer: Any) -> int:
    """The token behind which a model begins a document.

    Not always the beginning-of-text token: chat models may name the mark of a turn so, and write
    what stands in one behind it. But where the tokenizer puts it before any text, that is it.
    """
    if begin := leading(tokenizer):
        return begin[0]
    if not getattr(tokenizer, "chat_template", None):
        return prefix_token(tokenizer)
    marks, words = _marks(tokenizer), tokenizer.get_vocab()
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, *map(words.get, SEPARATORS)]
    return next((i for i in named if i is not None and i not in marks), prefix_token(tokenizer))


def _marks(tokenizer: Any) -> list[int]:
    """What stands in a chat, the first token of several turns apart; nothing if none is taken."""
    said = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    for turns, begun in (3, 1), (1, 0):  # the first token of a single turn may mark it
        try:
            text = render_chat(tokenizer, said[:turns], "a chat")
        except InputError:
            continue
        return tokenizer(text, add_special_tokens=False)["input_ids"][begun:]
    return []


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and content."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def as_messages(chat: Any, where: str) -> list[dict[str, Any]]:
    """A chat whose messages each hold one text; parts of a text are joined.

    A template would write anything else as Python's word for it.

    Raises:
        InputError: one holds none.
    """
    found = []
    for number, message in enumerate(chat, 1):
        role, content = message["role"], message["content"]
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str) or not isinstance(role, str):
            raise InputError(
                f"{where}: message {number} holds no text, but {str(content)[:40]!r} of the role "
                f"{str(role)[:40]!r}."
            )
        found.append({**message, "content": content})
    return found


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def render_chat(tokenizer: Any, messages: Any, where: str, *, ask: bool = False) -> str:
    """Messages as text, by the tokenizer's chat template, in a sandbox.

    Args:
        ask: end with what introduces the answer.

    Raises:
        InputError: there is no template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where} is a list of chat messages, and the tokenizer has no chat template: give "
            "text, or a model that has one."
        )
    from transformers.utils import chat_template_utils

    usual = chat_template_utils.ImmutableSandboxedEnvironment  # it bounds neither time nor size
    chat_template_utils.ImmutableSandboxedEnvironment = ChatSandbox
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"{where}: the chat template refuses these messages: {one_line(error)}"
        ) from None
    finally:
        chat_template_utils.ImmutableSandboxedEnvironment = usual
