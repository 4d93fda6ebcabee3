"""Read rows of chats: `messages`, `conversations` as ShareGPT has them, or the fields of Alpaca."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimrank.errors import DataError

MESSAGES = "messages"
LISTS = (MESSAGES, "conversations", "conversation")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
ALPACA_COLUMNS = ("instruction", "input", "output")
_ALPACA_NEEDS = {"instruction", "output"}
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: of the roles system, user, assistant and others that the chat template has, in order.
        where: the row it comes from, for errors.
    """

    messages: tuple[Message, ...]
    where: str

    def changed(self, change: Callable[[str], str]) -> Chat:
        """Return the chat with every text in its messages changed."""
        messages = [{key: change(v) if isinstance(v, str) else v for key, v in m.items()} for m in self.messages]
        return Chat(tuple(messages), self.where)


Document = str | Chat


def chat_columns(names: Sequence[str]) -> list[str]:
    """Name the columns that hold a chat; none if there is no chat."""
    listed = next((name for name in LISTS if name in names), None)
    if listed is not None:
        return [listed]
    return [name for name in ALPACA_COLUMNS if name in names] if set(names) >= _ALPACA_NEEDS else []


def chat_of(row: dict[str, Any], where: str) -> Chat | None:
    """Return the chat of a row that has `chat_columns`; None where its fields are null.

    An Alpaca row is one turn of the user (the instruction and, after a blank line, the input) and one of the assistant.

    Raises:
        DataError: messages that are not a list of objects with role and content (or from and value), or Alpaca fields
            that are not text.
    """
    name = next((name for name in LISTS if name in row), None)
    if name is None:
        return _alpaca(row, where)
    messages = row[name]
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: '{name}' is not a list of messages.", 'write [{"role": ..., "content": ...}, ...]')
    return Chat(tuple(_message(message, f"{where}: message {i}") for i, message in enumerate(messages, 1)), where)


def _message(message: Any, where: str) -> Message:
    """Return a message without fields that are null: parquet gives every message the fields of all others.

    ShareGPT calls the role `from` and the content `value`.
    """
    if isinstance(message, dict) and message.get("role") is None and isinstance(message.get("from"), str):
        return _of_sharegpt(message, where)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} is not an object with a role.", 'write {"role": "user", "content": "..."}')
    return {key: value for key, value in message.items() if value is not None}


def _of_sharegpt(message: dict[str, Any], where: str) -> Message:
    role, said = SHAREGPT_ROLES.get(message["from"].lower()), message.get("value")
    if role is None:
        raise DataError(f"{where} is from '{message['from']}'.", f"known: {', '.join(sorted(SHAREGPT_ROLES))}")
    if not isinstance(said, str):
        raise DataError(f"{where} has no text under 'value'.", 'write {"from": "human", "value": "..."}')
    return {"role": role, "content": said}


def _alpaca(row: dict[str, Any], where: str) -> Chat | None:
    asked, more, said = (row.get(name) for name in ALPACA_COLUMNS)
    if asked is None or said is None:
        return None
    for name in ALPACA_COLUMNS:
        if not isinstance(row.get(name) or "", str):
            raise DataError(f"{where}: '{name}' is a {type(row[name]).__name__}.", "give text (strings)")
    question = f"{asked}\n\n{more}" if more else asked
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": said}), where)
