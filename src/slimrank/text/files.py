"""Read rows of text from files: plain text, JSON Lines, JSON and parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slimrank.errors import DataError, MissingExtraError, first_line
from slimrank.text.rows import Row, columns_of, row_value
from slimrank.text.streams import lines_of, plain_name, text_of

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
WHAT_A_SOURCE_IS = (
    "a .txt, .jsonl, .json (also .gz, .zst) or .parquet file, a folder of them, hub:ID[:CONFIG[:SPLIT]], demo, or self"
)


def kind_of(path: Path) -> str:
    """Tell how a file is read: one of `SUFFIXES`, or "" for a file that slimrank does not read."""
    suffix = Path(plain_name(path)).suffix
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
        return iter([(f"'{path}'", text_of(path))])
    if kind == ".jsonl":
        return _lines(path, lines_of(path))
    if kind == ".json":
        return _json(path, text_of(path))
    if kind == ".parquet":
        return _parquet(path, chat)
    raise DataError(f"slimrank cannot read text from '{path}'.", WHAT_A_SOURCE_IS)


def _lines(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
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
        return _lines(path, text.split("\n"))
    rows = whole if isinstance(whole, list) else [whole]
    places = [f"row {number} of '{path}'" for number in range(1, len(rows) + 1)]
    return zip(places, rows, strict=True)


def _parquet(path: Path, chat: bool) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading '{path.name}'") from error
    if plain_name(path) != path.name.lower():
        raise DataError(f"'{path}' is a compressed parquet file.", "decompress it: parquet is compressed in itself")
    try:
        with parquet.ParquetFile(path) as file:
            columns = columns_of(file.schema_arrow.names, f"'{path}'", chat)
            rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
            yield from ((f"row {number} of '{path}'", row) for number, row in enumerate(rows, start=1))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"'{path}' is not a readable parquet file: {error}.", WHAT_A_SOURCE_IS) from error
