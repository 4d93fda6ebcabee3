"""Read rows of a source as documents. Rows without text are skipped, broken characters replaced; both are reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from slimrank.errors import DataError
from slimrank.text.chats import Chat, Document, chat_columns, chat_of
from slimrank.text.document_samples import DocumentSample

Row = tuple[str, Any]  # where it is, and its value
Tell = Callable[[str], None]

TEXT_COLUMNS = ("text", "content", "document", "sentence")
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
RENDER = (
    "slimrank compress --chat reads chats under 'messages' or 'conversations'; or render each chat with "
    "tokenizer.apply_chat_template(messages, tokenize=False) and store the result under 'text': "
    "see 'How to compress a chat model' in docs/troubleshooting.md"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def documents(rows: Iterable[Row], tell: Tell, most: int | None = None) -> list[Document]:
    """Check that the value of every row is text or a chat; of a text that is too large, keep a random sample.

    Args:
        rows: the place of each, and its value.
        tell: called with one sentence for each kind of row that is skipped or changed.
        most: characters that are kept at most; None keeps all.

    Raises:
        DataError: a value that is neither text, a chat nor null.
    """
    found = DocumentSample(most)
    null: list[str] = []
    broken: list[str] = []
    for where, value in rows:
        if value is None:
            null.append(where)
            continue
        document = value if isinstance(value, Chat) else _string(value, where)
        whole = document.changed(_whole) if isinstance(document, Chat) else _whole(document)
        if whole != document:
            broken.append(where)
        found.add(whole)
    if null:
        tell(f"{len(null)} rows without text (null) were skipped, the first is {null[0]}")
    if broken:
        tell(
            f"{len(broken)} documents hold half characters (lone surrogates), replaced by U+FFFD; "
            f"the first is {broken[0]}"
        )
    if found.note():
        tell(found.note())
    return found.kept()


def row_value(row: Any, where: str, chat: bool = False) -> Any:
    """Find the text of a row: the row itself, its text column or, if `chat` asks for it, its chat.

    Raises:
        DataError: a row of another kind, or without such a column.
    """
    if row is None or isinstance(row, str):
        return row
    if chat and isinstance(row, dict) and chat_columns(list(row)):
        return chat_of(row, where)
    if _is_chat(row):
        raise DataError(f"{where} is a chat, not text.", RENDER)
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is neither a string nor an object.", "write one JSON object per line, with its text under 'text'"
        )
    return row[text_column(list(row), where)]


def columns_of(names: Sequence[str], where: str, chat: bool) -> list[str]:
    """Choose the columns that `row_value` looks at.

    Raises:
        DataError: there is none.
    """
    return (chat_columns(names) if chat else []) or [text_column(names, where)]


def text_column(names: Sequence[str], where: str) -> str:
    """Choose the column that holds the text.

    Raises:
        DataError: there is none.
    """
    for name in TEXT_COLUMNS:
        if name in names:
            return name
    listed = ", ".join(map(str, names))
    if set(names) & set(CHAT_COLUMNS):
        raise DataError(f"{where} holds chats and no text column: {listed}.", RENDER)
    raise DataError(f"{where} has no text column: {listed}.", f"name the column one of {', '.join(TEXT_COLUMNS)}")


def _string(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if _is_chat(value):
        raise DataError(f"{where} holds a chat where text is expected.", RENDER)
    raise DataError(f"{where} holds a {type(value).__name__} where text is expected.", "give text (strings)")


def _whole(text: str) -> str:
    """Replace half characters."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
