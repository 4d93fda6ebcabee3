"""Read rows of text from files: plain text, JSON Lines, JSON and parquet."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimrank.errors import DataError, MissingExtraError, first_line
from slimrank.text.rows import Row, columns_of, row_value

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
WHAT_A_SOURCE_IS = (
    "a .txt, .jsonl, .json (also .gz) or .parquet file, a folder of them, hub:ID[:CONFIG[:SPLIT]], demo, or self"
)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),  # begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)


def kind_of(path: Path) -> str:
    """Tell how a file is read: one of `SUFFIXES`, or "" for a file that slimrank does not read."""
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES else ""


def existing(name: str) -> Path | None:
    """Return the file or folder of a name; None if there is none."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file system allows, or an unknown user
        return None


def file_rows(path: Path, chat: bool = False) -> Iterator[Row]:
    """Read the rows of a file; a plain text is a single one. If `chat` asks for it, rows may be chats.

    Raises:
        DataError: a file of another kind, or one that cannot be read.
        MissingExtraError: a parquet file without the extra `data`.
    """
    return ((where, row_value(row, where, chat)) for where, row in _raw_rows(path, chat))


def _raw_rows(path: Path, chat: bool) -> Iterator[Row]:
    kind = kind_of(path)
    if kind == ".txt":
        return iter([(f"'{path}'", _text(path))])
    if kind == ".jsonl":
        return _lines(path, _text(path))
    if kind == ".json":
        return _json(path, _text(path))
    if kind == ".parquet":
        return _parquet(path, chat)
    raise DataError(f"slimrank cannot read text from '{path}'.", WHAT_A_SOURCE_IS)


def _text(path: Path) -> str:
    """Decode a file: UTF-8, or what its byte order mark says. The mark itself is not text."""
    content = _content(path)
    mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if content.startswith(pair[0])), (b"", "UTF-8"))
    if not mark and content.count(0) > len(content) / 8:
        order = "LE" if content[1::2].count(0) > content[::2].count(0) else "BE"
        raise DataError(
            f"'{path}' holds NUL bytes: it is UTF-16 without a byte order mark, or not text.",
            f"if it is text: iconv -f UTF-16{order} -t UTF-8 '{path}' > utf8.txt",
        )
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise DataError(
            f"'{path}' is not {encoding} text: byte {at} is {content[at]:#04x}.",
            f"find out its encoding, then: iconv -f ENCODING -t UTF-8 '{path}' > utf8.txt",
        ) from error


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read: {error}.", "check the file, or download it again") from error


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"line {number} of '{path}'"
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers that are too long
                message = f"{where} is not JSON: {getattr(error, 'msg', first_line(error))}."
                raise DataError(message, "write one JSON object per line") from error
            yield where, row


def _json(path: Path, text: str) -> Iterator[Row]:
    """Read a .json file: one document or, as in many published data sets, one per line."""
    try:
        whole: Any = json.loads(text)
    except (ValueError, RecursionError):
        return _lines(path, text)
    rows = whole if isinstance(whole, list) else [whole]
    places = [f"row {number} of '{path}'" for number in range(1, len(rows) + 1)]
    return zip(places, rows, strict=True)


def _parquet(path: Path, chat: bool) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading '{path.name}'") from error
    try:
        columns = columns_of(parquet.read_schema(path).names, f"'{path}'", chat)
        rows = parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"'{path}' is not a readable parquet file: {error}.", WHAT_A_SOURCE_IS) from error
    return ((f"row {number} of '{path}'", row) for number, row in enumerate(rows, start=1))
