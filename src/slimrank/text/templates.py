"""Render chats by the chat template of a tokenizer, and find the tokens of the assistant in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from slimrank.errors import DataError, RecipeError, first_line
from slimrank.text.chats import Chat, Document, Message
from slimrank.text.tokens import tokenise

ASSISTANT = "assistant"
DATE = "26 Jul 2024"  # what templates of Llama 3 print; today's would make other tokens each day
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def rendered(document: Document, tokenizer: Any) -> str:
    """Return the text of a document; that of a chat by the tokenizer's chat template.

    Raises:
        RecipeError: the tokenizer has no chat template.
        DataError: the template cannot render the chat.
    """
    return _render(document, document.messages, tokenizer) if isinstance(document, Chat) else document


def assistant_tokens(chat: Chat, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the token ids of a chat (1-D), and a bool for each: it belongs to a turn of the assistant.

    Where the template marks turns of the assistant ({% generation %}), these are used. Otherwise a turn is what the
    template adds to the messages before it and the opening of a turn of the assistant.

    Raises:
        RecipeError: the tokenizer has no chat template.
        DataError: the template cannot render the chat, or renders its beginning otherwise than the whole.
    """
    whole = _render(chat, chat.messages, tokenizer)
    ids = tokenise(whole, tokenizer)
    if _GENERATION.search(_template(tokenizer)) and getattr(tokenizer, "is_fast", False):
        return ids, _marked(chat, tokenizer, len(ids))
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in _turns(chat, tokenizer, whole):
        mask[_shared(whole[:start], ids, tokenizer) : _shared(whole[:end], ids, tokenizer)] = True
    return ids, mask


def _template(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "the tokenizer has no chat template, and the text holds chats.",
            "use the chat version of the model, set tokenizer.chat_template, or render the chats and leave out --chat",
        )
    return str(tokenizer.get_chat_template())


def _render(chat: Chat, messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    _template(tokenizer)
    try:
        found = tokenizer.apply_chat_template(list(messages), tokenize=False, date_string=DATE, **options)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{chat.where}: the chat template cannot render the chat: {first_line(error)}.",
            "check the roles and contents of its messages, and which of them the template takes",
        ) from error
    return str(found)


def _marked(chat: Chat, tokenizer: Any, length: int) -> Tensor:
    """Return what the template marks as generated."""
    found = tokenizer.apply_chat_template(
        list(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, date_string=DATE
    )["assistant_masks"]
    if len(found) != length:
        raise DataError(f"{chat.where}: the tokenizer adds tokens to the rendered chat.", "use another tokenizer")
    return torch.tensor(found, dtype=torch.bool)


def _turns(chat: Chat, tokenizer: Any, whole: str) -> list[tuple[int, int]]:
    """Find the first character, and that after the last, of each turn of the assistant."""
    found = []
    for number, message in enumerate(chat.messages):
        if message["role"] == ASSISTANT:
            start = _start(chat, number, tokenizer, whole)
            found.append((start, _end(chat, number, tokenizer, whole, start)))
    return found


def _start(chat: Chat, number: int, tokenizer: Any, whole: str) -> int:
    """Find where a turn begins, after its opening; some templates open a new turn with more, such as <think>."""
    opened = _render(chat, chat.messages[:number], tokenizer, add_generation_prompt=True)
    if not whole.startswith(opened) and not whole.startswith(_render(chat, chat.messages[:number], tokenizer)):
        raise _unstable(chat, number)
    differ = (i for i, (one, other) in enumerate(zip(whole, opened, strict=False)) if one != other)
    return next(differ, len(opened))


def _end(chat: Chat, number: int, tokenizer: Any, whole: str, start: int) -> int:
    """Find where a turn ends. Some templates render more before the content of a last turn than of an earlier one."""
    through = _render(chat, chat.messages[: number + 1], tokenizer)
    if whole.startswith(through):
        return len(through)
    content = str(chat.messages[number].get("content", "")).strip()
    _, said, closing = through.rpartition(content) if content else ("", "", "")
    begin = len(whole) - len(whole[start:].lstrip())
    if not said or not whole.startswith(said + closing, begin):
        raise _unstable(chat, number)
    return begin + len(said + closing)


def _unstable(chat: Chat, number: int) -> DataError:
    return DataError(
        f"{chat.where}: the chat template renders message {number + 1} otherwise where more messages follow, "
        "so the tokens of the assistant are unknown.",
        "use a template that marks them with {% generation %}",
    )


def _shared(beginning: str, ids: Tensor, tokenizer: Any) -> int:
    """Count the tokens of a beginning of the text that are those of the whole."""
    found = tokenise(beginning, tokenizer)[: len(ids)]
    return int((found == ids[: len(found)]).long().cumprod(0).sum())
